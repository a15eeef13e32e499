"""Training with `--criterion earm_cross_entropy` through `fairseq-train`: schedule, drop-in use, variants, models."""
import math

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble_and_task

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.scoring import decoder_input
from tests.tiny_translation import ARCH, same_state, train, used_weights

EARM = ["--criterion", "earm_cross_entropy", "--label-smoothing", 0.1]
FROM_THE_FIRST = [*EARM, "--earm-start-update", 0, "--max-update", 3]
OF_NEGATIVES = {
    "earm_energy_data",
    "earm_energy_negatives",
    "earm_energy_gap",
    "earm_dv",
    "earm_log_normalizer",
    "earm_ess",
    "earm_max_weight",
    "earm_negative_length",
    "earm_truncated",
    "earm_distinct",
    "earm_sampling_seconds",
}
KEYS = OF_NEGATIVES | {"earm_loss"}
LSTM = [*"--arch lstm --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-hidden-size 16".split()]
LSTM += "--decoder-hidden-size 16 --decoder-out-embed-dim 16 --dropout 0.1".split()
CONVOLUTION = ["--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--decoder-out-embed-dim", 16, "--dropout", 0.1]
CONVOLUTION += ["--encoder-layers", "[(16, 3)]", "--decoder-layers", "[(16, 3)]", "--decoder-attention", "True"]
FCONV = ["--arch", "fconv", *CONVOLUTION]
WITHOUT_CACHE = ["--arch", "fconv_self_att", *CONVOLUTION, "--self-attention", "False", "--encoder-attention", "False"]


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """A run that uses E-ARM, with all its defaults, in each of three updates."""
    return train(tiny, tmp_path_factory.mktemp("plain"), *FROM_THE_FIRST)


def earm_keys(entry):
    return {key for key in entry if key.startswith("earm_")}


def is_sound(run, updates):
    """Whether every update was logged with finite figures, and the weights are finite."""
    log = run.log()
    finite = all(math.isfinite(value) for entry in log for value in entry.values())
    weights = used_weights(run.checkpoint()["model"]).values()
    return len(log) == updates and finite and all(bool(torch.isfinite(weight).all()) for weight in weights)


def test_padding_of_buckets_is_nobodys_data(tiny, tmp_path):
    whole = [*FROM_THE_FIRST, "--max-update", 1, "--dropout", 0, "--batch-size", 1000, "--max-tokens", 10**6]
    whole += ["--required-batch-size-multiple", 1]
    plain = train(tiny, tmp_path / "plain", *whole)
    padded = train(tiny, tmp_path / "padded", *whole, "--num-batch-buckets", 1)
    [of_plain], [of_padded] = plain.log(), padded.log()
    for key in ("nll_loss", "earm_energy_data"):
        assert of_padded[key] == pytest.approx(of_plain[key], rel=1e-3), key
    assert of_padded["wpb"] == of_plain["wpb"]
    assert is_sound(padded, 1)


@pytest.mark.parametrize("task", ["translation", "earm_translation"])
def test_earm_is_logged_from_its_start_on(tiny, tmp_path, task):
    run = train(tiny, tmp_path, *EARM, "--earm-start-update", 2, "--max-update", 4, "--task", task)
    assert [earm_keys(entry) for entry in run.log()] == [set(), set(), KEYS, KEYS]
    assert is_sound(run, 4)
    [epoch] = run.log("train")
    assert {f"train_{key}" for key in KEYS} <= epoch.keys()
    assert all(0 < entry["earm_ess"] <= 1 <= entry["earm_max_weight"] for entry in run.log()[2:])


OFF = {"weight-0": ["--earm-weight", 0, "--earm-start-update", 0], "not-started": ["--earm-start-epoch", 2]}


@pytest.mark.parametrize("off", OFF.values(), ids=OFF)
def test_switched_off_it_trains_as_stock_does(tiny, tmp_path, off):
    flags = ["--label-smoothing", 0.1, "--max-update", 4, "--report-accuracy"]
    stock = train(tiny, tmp_path / "stock", "--criterion", "label_smoothed_cross_entropy", *flags)
    earm = train(tiny, tmp_path / "earm", *EARM, *flags, *off)
    assert same_state(stock.checkpoint(), earm.checkpoint())
    figures = ("loss", "nll_loss", "accuracy", "gnorm", "wpb", "bsz")
    assert [[entry[key] for key in figures] for entry in earm.log()] == [[entry[key] for key in figures] for entry in stock.log()]
    assert not any(earm_keys(entry) for entry in earm.log())


def test_it_takes_the_place_of_cross_entropy_unchanged(tiny, tmp_path):
    flags = ["--max-update", 4, "--sentence-avg"]
    stock = train(tiny, tmp_path / "stock", "--criterion", "cross_entropy", *flags)
    earm = train(tiny, tmp_path / "earm", "--criterion", "earm_cross_entropy", *flags, "--earm-start-epoch", 2)
    assert [entry["loss"] for entry in earm.log()] == [entry["loss"] for entry in stock.log()]


VARIANTS = [
    ["--earm-sampler", "generator", "--earm-sampling-topk", 5, "--earm-variance-reduction", "none"],
    ["--earm-energy-steps", "last"],
    ["--earm-energy-steps", "post"],
    ["--earm-normalizer", "source", "--earm-negatives", 2],
    ["--earm-normalizer-ema", 0.9],
    ["--earm-variance-reduction", "none"],
    ["--earm-recent-tokens", 0],
    ["--earm-smooth-history"],
    ["--earm-weight", 0.25],
    ["--ignore-prefix-size", 1],
]


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: " ".join(map(str, flags)))
def test_variants_train_each_in_its_own_way(tiny, tmp_path, plain, flags):
    run = train(tiny, tmp_path, *FROM_THE_FIRST, *flags)
    assert is_sound(run, 3)
    assert [earm_keys(entry) for entry in run.log()] == [KEYS] * 3
    assert not same_state(run.checkpoint(), plain.checkpoint())


def test_the_control_samples_nothing(tiny, tmp_path, plain, monkeypatch):
    monkeypatch.setattr(AncestralSampler, "__call__", None)
    run = train(tiny, tmp_path, *FROM_THE_FIRST, "--earm-control")
    assert is_sound(run, 3)
    assert [earm_keys(entry) for entry in run.log()] == [{"earm_loss"}] * 3
    assert not same_state(run.checkpoint(), plain.checkpoint())


def test_accuracy_is_reported_and_changes_nothing(tiny, tmp_path, plain):
    run = train(tiny, tmp_path, *FROM_THE_FIRST, "--report-accuracy")
    assert all(0 < entry["accuracy"] < 100 for entry in run.log())
    assert same_state(run.checkpoint(), plain.checkpoint())


def test_averaging_over_sentences_scales_the_gradient(tiny, tmp_path, plain):
    """The first update's gradient is a sum over the same batch, divided by its sentences in place of its tokens."""
    run = train(tiny, tmp_path, *FROM_THE_FIRST, "--sentence-avg", "--max-update", 1)
    [by_sentence], by_token = run.log(), plain.log()[0]
    assert by_sentence["wpb"] > by_sentence["bsz"]
    assert by_sentence["gnorm"] == pytest.approx(by_token["gnorm"] * by_token["wpb"] / by_token["bsz"], rel=2e-3)
    assert by_sentence["earm_loss"] == by_token["earm_loss"]


def test_an_update_may_be_made_of_several_batches(tiny, tmp_path, plain):
    run = train(tiny, tmp_path, *FROM_THE_FIRST, "--update-freq", 2, "--max-update", 2)
    assert is_sound(run, 2)
    assert [earm_keys(entry) for entry in run.log()] == [KEYS] * 2
    assert [entry["bsz"] for entry in run.log()] == [2 * plain.log()[0]["bsz"]] * 2


def test_translating_during_training_leaves_no_trace(tiny, tmp_path):
    """`--eval-bleu` builds a generator, with its beams and in eval mode, on the model that is being trained."""
    flags = [*FROM_THE_FIRST, "--task", "earm_translation"]
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 5, "max_len_b": 5}', "--energy-rerank"]
    often = ["--valid-subset", "test", "--validate-interval-updates", 1]
    quiet = train(tiny, tmp_path / "quiet", *flags)
    translating = train(tiny, tmp_path / "translating", *flags, *often, *bleu, validate=True)
    assert same_state(quiet.checkpoint(), translating.checkpoint())
    assert len(translating.log("test")) == 3


@pytest.mark.parametrize("arch", [LSTM, FCONV, WITHOUT_CACHE], ids=lambda arch: arch[1])
def test_other_models_train_and_are_sampled_exactly(tiny, tmp_path, arch):
    """Each draw's probability, computed token by token, is that of one pass over the whole sample."""
    run = train(tiny, tmp_path, *FROM_THE_FIRST, arch=arch)
    assert is_sound(run, 3)
    [model], _, task = load_model_ensemble_and_task([str(tmp_path / "checkpoint_last.pt")])
    task.load_dataset("test")
    batch = task.dataset("test").collater([task.dataset("test")[i] for i in range(7)])["net_input"]
    samples = AncestralSampler(task.target_dictionary)(model.eval(), batch, negatives=4)
    assert len(set(samples.lengths.tolist())) > 2
    with torch.no_grad():
        encoder_out = model.encoder.reorder_encoder_out(
            model.encoder(batch["src_tokens"], src_lengths=batch["src_lengths"]), samples.sources
        )
        logits = model.decoder(decoder_input(samples.tokens, task.target_dictionary.eos()), encoder_out=encoder_out)[0]
    logits[..., task.target_dictionary.pad()] = -math.inf
    expected = logits.log_softmax(-1).gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(samples.log_q[samples.mask], expected[samples.mask], atol=1e-4)


def test_a_model_without_incremental_decoding_is_said_to_be_slow(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fairseq_earm.sampling.decoding._warned", set())
    run = train(tiny, tmp_path, *FROM_THE_FIRST, "--max-update", 1, arch=WITHOUT_CACHE)
    assert [line for line in run.warnings() if "no incremental decoding" in line and line.startswith("FConvDecoder")]


@pytest.mark.parametrize("kind", ["nonautoregressive_transformer", "levenshtein_transformer"])
def test_models_that_do_not_write_from_left_to_right_are_refused(kind, tiny, tmp_path):
    with pytest.raises(UsageError, match="--criterion earm_cross_entropy: E-ARM writes its negatives from left to right, and .* cannot"):
        train(tiny, tmp_path, *FROM_THE_FIRST, arch=["--arch", kind, *ARCH[2:]])
