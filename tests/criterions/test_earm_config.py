"""Settings that cannot work are refused in one line that names flag, value and remedy, before any training."""
from __future__ import annotations

import math
from argparse import Namespace

import pytest
import torch
from fairseq.data import Dictionary

from fairseq_earm.criterions.earm_checks import check_config
from fairseq_earm.criterions.earm_cross_entropy import EarmCrossEntropyCriterion
from fairseq_earm.errors import UsageError
from tests.criterions.stubs import Task, batch, build, config
from tests.tiny_model import tiny_model


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"earm_weight": -0.5}, "--earm-weight -0.5: give"),
        ({"earm_weight": math.nan}, "--earm-weight nan: give"),
        ({"earm_weight": math.inf}, "--earm-weight inf: give"),
        ({"earm_start_epoch": 15, "max_epoch": 10}, "--earm-start-epoch 15: training ends with --max-epoch 10"),
        ({"earm_start_epoch": 0}, "--earm-start-epoch 0"),
        ({"earm_start_update": 100, "max_update": 100}, "--earm-start-update 100: training ends with --max-update 100"),
        ({"earm_start_update": -2}, "--earm-start-update -2"),
        ({"earm_warmup_updates": -1}, "--earm-warmup-updates -1"),
        ({"earm_recent_tokens": -2}, "--earm-recent-tokens -2"),
        ({"earm_smooth_history": True, "earm_recent_tokens": 0}, "--earm-smooth-history True"),
        ({"earm_negatives": 0}, "--earm-negatives 0"),
        ({"earm_normalizer": "source"}, "--earm-negatives 1: one negative per source"),
        ({"earm_normalizer_ema": 1.0}, "--earm-normalizer-ema 1.0"),
        ({"earm_normalizer_ema": math.nan}, "--earm-normalizer-ema nan"),
        ({"earm_normalizer_ema": 0.9, "earm_normalizer": "source", "earm_negatives": 2}, "--earm-normalizer-ema 0.9"),
        ({"earm_max_len_a": -1.0}, "--earm-max-len-a -1.0"),
        ({"earm_max_len_b": -1}, "--earm-max-len-b -1"),
        ({"earm_max_len_a": 0.0, "earm_max_len_b": 0}, "--earm-max-len-b 0"),
        ({"earm_max_len_b": 64}, "--earm-max-len-b 64: negatives would exceed the model's 64 target positions"),
        ({"earm_loss_rows": -1}, "--earm-loss-rows -1"),
        ({"earm_sampling_bf16": True, "earm_sampler": "generator"}, "--earm-sampling-bf16 True: --earm-sampler generator draws"),
        ({"earm_sampling_topk": 5}, "--earm-sampler ancestral"),
        ({"label_smoothing": -0.1}, "--label-smoothing -0.1: give"),
        ({"label_smoothing": math.nan}, "--label-smoothing nan: give"),
        (
            {"earm_sampling_topk": 7, "earm_sampler": "generator", "earm_variance_reduction": "none"},
            "--earm-sampling-topk 7: the target dictionary has 6",
        ),
        ({"earm_sampling_topk": 5, "earm_sampling_topp": 0.9, "earm_sampler": "generator"}, "--earm-sampling-topk 5: --earm-sampling-topp"),
        ({"earm_sampling_topk": 0, "earm_sampler": "generator"}, "--earm-sampling-topk 0"),
        ({"earm_sampling_topp": 1.5, "earm_sampler": "generator"}, "--earm-sampling-topp 1.5"),
        ({"earm_sampling_temperature": 0.0, "earm_sampler": "generator"}, "--earm-sampling-temperature 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags, says):
    with pytest.raises(UsageError) as refused:
        build(tiny_model(), **flags)
    message = str(refused.value)
    assert message.startswith(f"fairseq-earm: error: {says}") and "\n" not in message


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"earm_weight": 0.0, "earm_start_epoch": 15, "max_epoch": 10},
        {"earm_start_epoch": 15, "max_epoch": 15},
        {"earm_start_epoch": 15, "max_epoch": 10, "earm_start_update": 3, "max_update": 4},
        {"earm_normalizer": "source", "earm_negatives": 2},
        {"earm_normalizer": "source", "earm_control": True},
        {
            "earm_sampler": "generator", "earm_sampling_topp": 0.9, "earm_sampling_temperature": 0.7,
            "earm_variance_reduction": "rao-blackwell",
        },
        {"earm_sampler": "generator", "earm_sampling_topp": 0.9, "earm_control": "likelihood"},
        {"earm_max_len_b": 63},
    ],
)
def test_settings_that_work_are_taken(flags):
    check_config(config(**flags))


@pytest.mark.parametrize("eos_index", [None, 99, 1])
def test_a_dictionary_without_end_of_sentence_is_refused(eos_index):
    dictionary = Dictionary()
    dictionary.eos_index = eos_index
    with pytest.raises(UsageError, match="no end-of-sentence"):
        EarmCrossEntropyCriterion(Task(dictionary), config())


def test_models_and_data_that_do_not_fit_are_refused():
    model = tiny_model().train()
    with pytest.raises(UsageError, match="encoder-decoder models, and Namespace is none; .*earm_language_modeling"):
        build(model)(Namespace(decoder=model.decoder, training=True), batch(model))
    task = Task(model.decoder.dictionary)
    task.cfg = Namespace(left_pad_target=True)
    with pytest.raises(UsageError, match="--left-pad-target True"):
        EarmCrossEntropyCriterion(task, config())


def test_tasks_with_positions_per_language_pair_are_taken():
    task = Task(tiny_model().decoder.dictionary, positions={"de-en": (64, 64)})
    assert EarmCrossEntropyCriterion(task, config()).family.sampler.max_len_b == config().earm_max_len_b


def test_a_step_after_the_last_position_is_refused():
    model = tiny_model(max_target_positions=4, learned_positions=True).train()
    criterion = build(model, earm_energy_steps="post", earm_max_len_a=0.0, earm_max_len_b=2)
    criterion(model, batch(model, rows=((5,), (4, 5), (5, 4))))  # three tokens with the end, and the step after them
    with pytest.raises(UsageError, match="--earm-energy-steps post.* 4 positions"):
        criterion(model, batch(model))
    sinusoidal = tiny_model(max_target_positions=4).train()
    build(sinusoidal, earm_energy_steps="post", earm_max_len_a=0.0, earm_max_len_b=2)(sinusoidal, batch(sinusoidal))
