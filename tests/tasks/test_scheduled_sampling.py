"""Scheduled sampling through `fairseq-train --task earm_translation`, with each criterion."""
import json
from types import SimpleNamespace

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.tasks.translation import TranslationTask
from omegaconf import OmegaConf

from fairseq_earm.sampling.scheduled import Predictions, scheduled_sampling
from fairseq_earm.tasks.scheduled_sampling import ScheduledSampling, ScheduledSamplingConfig
from tests import tiny_language
from tests.criterions.stubs import NEGATIVES, FixedSampler, batch, build
from tests.test_distributed import EPOCH, WORKERS, run_workers
from tests.tiny_model import tiny_model
from tests.tiny_translation import generate, recorded_log, same_state, train, train_arguments, used_weights

TASK = ["--task", "earm_translation", "--max-update", 3]
SMOOTHED = ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1]
EARM = ["--criterion", "earm_cross_entropy", "--label-smoothing", 0.1, "--earm-start-update", 1, "--earm-weight", 0.5]
CRITERIONS = {"cross_entropy": ["--criterion", "cross_entropy"], "label_smoothed_cross_entropy": SMOOTHED, "earm_cross_entropy": EARM}
LINEAR = ["--scheduled-sampling", "linear", "--scheduled-sampling-decay-updates"]
HALF = ["--scheduled-sampling", "constant", "--scheduled-sampling-start-probability", 0.5]
MIX = ["--scheduled-sampling-prediction", "topk-mix", "--scheduled-sampling-topk", 3, "--scheduled-sampling-temperature", 0.8]
SAMPLE = ["--scheduled-sampling-prediction", "sample"]
THROUGH = [*MIX, "--scheduled-sampling-through-first-pass"]


@pytest.fixture(scope="module")
def stock(tiny, tmp_path_factory):
    """The checkpoints of runs without scheduled sampling, each trained when it is first asked for."""
    found = {}

    def checkpoint(criterion):
        if criterion not in found:
            found[criterion] = train(tiny, tmp_path_factory.mktemp(criterion), *TASK, *CRITERIONS[criterion]).checkpoint()
        return found[criterion]

    return checkpoint


ALWAYS = [*LINEAR, 10**12]  # from the second update on there are two passes, but p is 1 − 10⁻¹² and nothing is replaced


@pytest.mark.parametrize("criterion", ["cross_entropy", "label_smoothed_cross_entropy"])
@pytest.mark.parametrize("prediction", [[], SAMPLE, MIX], ids=["argmax", "sample", "topk-mix"])
def test_training_is_stock_to_the_bit_where_all_is_teacher_forced(tiny, tmp_path, stock, criterion, prediction):
    run = train(tiny, tmp_path, *TASK, *CRITERIONS[criterion], *ALWAYS, *prediction)
    assert same_state(run.checkpoint(), stock(criterion))


@pytest.mark.parametrize("prediction", [[], THROUGH], ids=["argmax", "through"])
def test_with_earm_but_for_the_order_of_sums_it_is_stock_too(tiny, tmp_path, prediction):
    """Energies and cross-entropy then come from two passes that say the same."""
    flags = [*TASK, *EARM, "--optimizer", "sgd", "--lr", 0.3]
    one, two = (train(tiny, tmp_path / str(len(more)), *flags, *more) for more in ([], [*ALWAYS, *prediction]))
    weights = [used_weights(run.checkpoint()["model"]) for run in (one, two)]
    assert all(torch.allclose(weights[0][name], weights[1][name], rtol=0, atol=1e-5) for name in weights[0])
    assert [entry["earm_loss"] for entry in two.log()[1:]] == pytest.approx([entry["earm_loss"] for entry in one.log()[1:]], abs=2e-3)


@pytest.mark.parametrize("criterion", CRITERIONS)
@pytest.mark.parametrize("prediction", [[], SAMPLE, MIX, THROUGH], ids=["argmax", "sample", "topk-mix", "through"])
def test_every_criterion_trains_and_learns_something_else(tiny, tmp_path, stock, criterion, prediction):
    found = train(tiny, tmp_path, *TASK, *CRITERIONS[criterion], *HALF, *prediction)
    weights = [used_weights(run["model"]) for run in (found.checkpoint(), stock(criterion))]
    assert all(bool(torch.isfinite(weight).all()) for weight in weights[0].values())
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert [entry["teacher_forcing"] for entry in found.log()] == [0.5] * 3


def test_the_gradient_through_the_first_pass_makes_a_difference(tiny, tmp_path):
    off, on = (train(tiny, tmp_path / str(len(flags)), *TASK, *SMOOTHED, *HALF, *flags).checkpoint() for flags in (MIX, THROUGH))
    assert not same_state(off, on)


def test_the_schedule_starts_where_it_is_told_to(tiny, tmp_path, stock):
    flags = [*LINEAR, 2, "--scheduled-sampling-minimum-probability", 0.2, "--scheduled-sampling-start-update"]
    early = train(tiny, tmp_path / "early", *TASK, *SMOOTHED, *flags, 1, "--max-update", 5)
    assert [entry["teacher_forcing"] for entry in early.log()] == [1, 1, 0.6, 0.2, 0.2]
    late = train(tiny, tmp_path / "late", "--task", "earm_translation", *SMOOTHED, *flags, 3, "--max-epoch", 1)
    assert [entry["teacher_forcing"] for entry in late.log()[:5]] == [1, 1, 1, 1, 0.6]
    for name, criterion in CRITERIONS.items():
        until_start = train(tiny, tmp_path / name, *TASK, *flags, 2, *criterion)
        assert same_state(until_start.checkpoint(), stock(name))


@pytest.mark.parametrize("flags", [
    [*SMOOTHED, *LINEAR, 6, *SAMPLE],
    [*EARM, "--earm-start-update", 2, "--scheduled-sampling", "exponential", "--scheduled-sampling-rate", 0.8, *THROUGH],
], ids=["sample", "through, E-ARM"])
def test_a_stopped_run_goes_on_as_if_never_stopped(tiny, tmp_path, flags):
    flags = ["--task", "earm_translation", *flags, "--update-freq", 2, "--batch-size", 48]
    whole = train(tiny, tmp_path / "whole", *flags, "--max-update", 7).checkpoint()
    train(tiny, tmp_path / "stopped", *flags, "--max-update", 4)
    assert same_state(train(tiny, tmp_path / "stopped", *flags, "--max-update", 7).checkpoint(), whole)


@pytest.mark.parametrize("prediction", [SAMPLE, THROUGH], ids=["sample", "through"])
def test_language_models_too(text, tmp_path, prediction):
    flags = ["--task", "earm_language_modeling", "--tokens-per-sample", 12, "--earm-negative-length", 6, "--max-update", 3]
    where, arch = SimpleNamespace(data=text.data), tiny_language.ARCH
    stock = train(where, tmp_path / "stock", *flags, *EARM, arch=arch)
    found = train(where, tmp_path / "found", *flags, *EARM, *HALF, *prediction, arch=arch)
    assert [entry["teacher_forcing"] for entry in found.log()] == [0.5] * 3
    first, other = (run.log()[0]["loss"] for run in (stock, found))
    assert first != other and all(torch.isfinite(weight).all() for weight in used_weights(found.checkpoint()["model"]).values())


def train_on_two(tiny, folder, *flags):
    """What two workers printed and left behind after an epoch of plain gradient descent, for whose end one has no batch."""
    descent = ["--optimizer", "sgd", "--lr", 0.3, *EPOCH, *WORKERS, "--task", "earm_translation"]
    printed = run_workers(folder, train_arguments(tiny, folder / "out", *HALF, *flags, *descent))
    return printed, [torch.load(folder / f"{rank}.pt", weights_only=False)["weights"] for rank in (0, 1)]


def test_workers_end_with_equal_weights(tiny, tmp_path):
    """With E-ARM and a gradient through the first pass."""
    printed, left = train_on_two(tiny, tmp_path, *EARM, *THROUGH, "--ddp-backend", "legacy_ddp")
    first, second = map(used_weights, left)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(torch.isfinite(weight).all()) for weight in first.values())
    entries = [json.loads(line[line.index("{"):]) for line in printed.splitlines() if "train_inner" in line and "{" in line]
    assert [entry["teacher_forcing"] for entry in entries] == ["0.5"] * 7


@pytest.mark.parametrize("flags", [[*SMOOTHED, *SAMPLE], [*EARM, *MIX]], ids=["sample", "topk-mix, E-ARM"])
def test_sharded_workers_learn_the_same(tiny, tmp_path, flags):
    pytest.importorskip("fairscale", reason="--ddp-backend fully_sharded needs fairscale, which is not installed")
    found = []
    for backend in (["legacy_ddp"], ["fully_sharded", "--min-params-to-wrap", 1]):
        (tmp_path / backend[0]).mkdir()
        found.append(train_on_two(tiny, tmp_path / backend[0], *flags, "--ddp-backend", *backend)[1][0])
    for name, weight in used_weights(found[0]).items():
        assert torch.allclose(weight, found[1][name], rtol=0, atol=1e-5), name


def test_validation_and_generation_are_the_stock_ones(tiny, tmp_path):
    search = ["--beam", 3, "--max-len-b", 8]
    assert generate(tiny, *search, *HALF) == generate(tiny, *search)
    losses = []
    for number, flags in enumerate(([], HALF)):
        with recorded_log() as records:
            train(tiny, tmp_path / str(number), *TASK, *SMOOTHED, *flags, "--lr", 0, "--max-update", 1, validate=True)
        [entry] = [json.loads(r.getMessage()) for r in records if r.name == "valid"]
        losses.append((entry["valid_loss"], entry["valid_nll_loss"], "valid_teacher_forcing" in entry))
    assert losses[0] == losses[1] and not losses[1][2]


def value_and_gradient(model, criterion, sample):
    model.zero_grad()
    loss = criterion(model, sample)[0]
    loss.backward()
    used = used_weights(dict(model.named_parameters()))
    return {"loss": loss.detach().double(), **{name: weight.grad.clone() for name, weight in used.items()}}


@pytest.mark.parametrize("flags", [{}, {"earm_energy_steps": "post"}, {"earm_smooth_history": True}, {"earm_control": True}])
def test_earm_adds_to_the_second_passes_cross_entropy_what_it_adds_to_one_passes(flags):
    """Its own terms are those of the data as it is, and of negatives as they are."""
    model = tiny_model(words=3).train()
    earm = [build(model, earm_weight=weight, label_smoothing=0.1, ignore_prefix_size=1, **flags) for weight in (1.0, 2.0)]
    for criterion in earm:
        criterion.family.sampler = FixedSampler(model, NEGATIVES)
    stock = LabelSmoothedCrossEntropyCriterion(earm[0].task, False, 0.1, ignore_prefix_size=1)
    one_pass = [value_and_gradient(model, criterion, batch(model)) for criterion in (*earm, stock)]
    with scheduled_sampling(model, 0.0, Predictions("argmax")):
        two_passes = [value_and_gradient(model, criterion, batch(model)) for criterion in (*earm, stock)]
    assert not torch.allclose(two_passes[2]["loss"], one_pass[2]["loss"], rtol=0.1)
    for name in one_pass[0]:
        added = [twice[name] - once[name] for once, twice, _ in (one_pass, two_passes)]
        # fairseq's attention to the source and its criterion compute in float32.
        assert torch.allclose(added[1], added[0], rtol=1e-5, atol=1e-5), name
        assert torch.allclose(two_passes[0][name] - added[1], two_passes[2][name], rtol=1e-4, atol=1e-5), name


class Stock:
    """As much of a task as the mixin calls: a step that trains nothing."""

    def __init__(self, cfg):
        self.cfg, self.target_dictionary = cfg, range(8)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        return sample, ignore_grad


class Task(ScheduledSampling, Stock):
    pass


def config(max_update=0, scheduled_sampling="none", **flags):
    """A task's configuration; `flags` are named without their beginning, which is the same for all."""
    given = {f"scheduled_sampling_{name}": value for name, value in flags.items()}
    stock = {"max_update": max_update, "scheduled_sampling": scheduled_sampling}
    return OmegaConf.merge(OmegaConf.structured(ScheduledSamplingConfig), stock, given)


def test_what_the_criterion_ignores_is_given(monkeypatch):
    """And what is asked for is what is done."""
    asked = []

    class Pass:
        def __init__(self, *args, **kwargs):
            asked.append((args, kwargs))

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("fairseq_earm.tasks.scheduled_sampling.scheduled_sampling", Pass)
    mix = {"prediction": "topk-mix", "topk": 3, "temperature": 0.5, "through_first_pass": True, "decay_updates": 10}
    task = Task(config(scheduled_sampling="linear", **mix))
    ignoring = type("Criterion", (), {"ignore_prefix_size": 2})
    assert task.train_step("batch", "model", ignoring, None, 5, True) == ("batch", True)
    task.train_step("batch", "model", object(), None, update_num=7)
    predictions = Predictions("topk-mix", 3, 0.5, True)
    assert asked == [(("model", 0.5, predictions), {"given": 2}), (("model", pytest.approx(0.3), predictions), {"given": 0})]


LINE = {"scheduled_sampling": "linear", "decay_updates": 5}


@pytest.mark.parametrize("flags, message", [
    ({"topk": 3}, "--scheduled-sampling-topk 3: no effect without a schedule; give --scheduled-sampling too"),
    ({"through_first_pass": True}, "--scheduled-sampling-through-first-pass True: no effect without"),
    ({**LINE, "start_probability": 1.5}, "--scheduled-sampling-start-probability 1.5: give a probability"),
    ({**LINE, "start_probability": float("nan")}, "--scheduled-sampling-start-probability nan: give a probability"),
    ({**LINE, "minimum_probability": 1.0}, "--scheduled-sampling-minimum-probability 1.0: give a probability below 1"),
    ({**LINE, "minimum_probability": -0.1}, "--scheduled-sampling-minimum-probability -0.1: give a probability below 1"),
    ({**LINE, "start_probability": 0.3, "minimum_probability": 0.5}, "0.5: is above the start probability, 0.3; give a lower one"),
    ({"scheduled_sampling": "constant"}, "--scheduled-sampling-start-probability 1.0: a constant 1 is no scheduled sampling"),
    ({"scheduled_sampling": "constant", "start_probability": 0.9, "minimum_probability": 0.1}, "constant has no minimum"),
    ({"scheduled_sampling": "linear"}, "--scheduled-sampling-decay-updates 0: linear needs the number of updates"),
    ({**LINE, "rate": 0.5}, "--scheduled-sampling-rate 0.5: linear has none; leave it out, or give exponential"),
    ({"scheduled_sampling": "exponential"}, "--scheduled-sampling-rate 0.0: exponential needs a number between 0 and 1"),
    ({"scheduled_sampling": "exponential", "rate": 1.0}, "--scheduled-sampling-rate 1.0: exponential needs a number between 0 and 1"),
    ({"scheduled_sampling": "exponential", "rate": 0.9, "decay_updates": 5}, "decay-updates 5: exponential has none; leave it out"),
    ({"scheduled_sampling": "inverse-sigmoid", "rate": 0.9}, "--scheduled-sampling-rate 0.9: inverse-sigmoid needs a number of at least 1"),
    ({**LINE, "start_update": -1}, "--scheduled-sampling-start-update -1: give a number of at least 0"),
    ({**LINE, "start_update": 9, "max_update": 9}, "start-update 9: training ends with --max-update 9, so it would never start"),
    ({**LINE, "topk": 3}, "--scheduled-sampling-topk 3: topk-mix alone has it; give --scheduled-sampling-prediction topk-mix"),
    ({**LINE, "prediction": "topk-mix", "topk": 0}, "--scheduled-sampling-topk 0: give 1 to 7, the symbols of the dictionary"),
    ({**LINE, "prediction": "topk-mix", "topk": 8}, "--scheduled-sampling-topk 8: give 1 to 7, the symbols of the dictionary"),
    ({**LINE, "prediction": "sample", "temperature": 0.0}, "--scheduled-sampling-temperature 0.0: give a finite number above 0"),
    ({**LINE, "temperature": 0.5}, "--scheduled-sampling-temperature 0.5: the likeliest token is the same at any; leave it out"),
    ({**LINE, "through_first_pass": True}, r"through-first-pass True: a token \(argmax\) hands on no gradient; give .* topk-mix"),
])
def test_flags_that_cannot_work_are_named(flags, message):
    with pytest.raises(SystemExit, match=message):
        Task(config(**flags))


@pytest.mark.parametrize("flags", [
    {},
    {**LINE, "start_probability": 0.5, "minimum_probability": 0.5, "start_update": 9, "max_update": 10},
    {"scheduled_sampling": "constant", "start_probability": 0.0, "prediction": "topk-mix", "topk": 7},
    {"scheduled_sampling": "inverse-sigmoid", "rate": 1.0, "prediction": "sample", "temperature": 3.0},
])
def test_flags_that_can_work_are_taken(flags):
    Task(config(**flags))


def test_bad_flags_end_training_before_it_begins(tiny, tmp_path):
    with pytest.raises(SystemExit, match="--scheduled-sampling-start-update 3: training ends with --max-update 3, so it would never start"):
        train(tiny, tmp_path, *TASK, *SMOOTHED, *HALF, "--scheduled-sampling-start-update", 3)
    assert not list(tmp_path.glob("*.pt"))


def test_models_without_a_fit_decoder_are_refused(tiny, monkeypatch):
    half = {"scheduled_sampling": "constant", "scheduled_sampling_start_probability": 0.5}
    _, cfg, task = load_model_ensemble_and_task([str(tiny.a)], arg_overrides=half)
    assert task.build_model(cfg.model).decoder is not None
    monkeypatch.setattr(TranslationTask, "build_model", lambda *args, **kwargs: torch.nn.Linear(1, 1))
    with pytest.raises(SystemExit, match="--scheduled-sampling: Linear has no decoder"):
        task.build_model(cfg.model)
