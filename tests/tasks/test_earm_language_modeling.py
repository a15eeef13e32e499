"""Language models trained by E-ARM through stock commands."""
import math
import re

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble_and_task

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.language_model import LanguageModelFamily
from fairseq_earm.sampling.scoring import full_logits
from tests.test_checkpoints import bare, shapes
from tests.test_distributed import train_on_two
from tests.test_training import FROM_THE_FIRST, KEYS, earm_keys, is_sound
from tests.tiny_language import ARCH, TEXT
from tests.tiny_translation import OPTIMISATION, command, same_state, tagged, train, used_weights

TASK = [*TEXT, "--task", "earm_language_modeling"]
SHORT = [*FROM_THE_FIRST, "--earm-negative-length", 6]
SENTENCES = ["--sample-break-mode", "eos"]
UNTIED = [flag for flag in ARCH if flag != "--share-decoder-input-output-embed"]
ADAPTIVE = [*UNTIED, "--adaptive-softmax-cutoff", "6,10", "--adaptive-softmax-factor", 2]
TIED = [
    *ADAPTIVE, "--adaptive-input", "--adaptive-input-cutoff", "6,10", "--adaptive-input-factor", 2, "--tie-adaptive-weights",
    "--tie-adaptive-proj", "--decoder-input-dim", 16, "--decoder-output-dim", 16,
]
WIDTH = ["--decoder-embed-dim", 16, "--dropout", 0.1]
MODELS = {
    "transformer_lm": ARCH,
    "transformer_lm, untied": UNTIED,
    "transformer_lm, adaptive softmax": ADAPTIVE,
    "transformer_lm, adaptive input and softmax, tied": TIED,
    "lstm_lm": ["--arch", "lstm_lm", *WIDTH, "--decoder-out-embed-dim", 16, "--decoder-hidden-size", 16],
    "fconv_lm": ["--arch", "fconv_lm", *WIDTH, "--decoder-layers", "[(16, 3)] * 2"],
    "lightconv_lm": [
        "--arch", "lightconv_lm", *WIDTH, "--decoder-layers", 1, "--decoder-ffn-embed-dim", 32, "--decoder-attention-heads", 2,
        "--decoder-kernel-size-list", "[3]", "--decoder-conv-type", "lightweight",
    ],
}


def train_lm(text, folder, *arguments, arch=ARCH, **options):
    return train(text, folder, *TASK, *arguments, arch=arch, **options)


def load(run, **overrides):
    [model], _, task = load_model_ensemble_and_task([str(run.folder / "checkpoint_last.pt")], arg_overrides=overrides)
    return model, task


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS)
def test_models_train_and_are_sampled_exactly(text, tmp_path, arch):
    """Each draw's probability, computed token by token, is that of one pass over block and negative."""
    run = train_lm(text, tmp_path, *SHORT, "--earm-prefix-length", 4, arch=arch)
    assert is_sound(run, 3) and [earm_keys(entry) for entry in run.log()] == [KEYS] * 3
    model, task = load(run)
    task.load_dataset("test")
    batch = task.dataset("test").collater([task.dataset("test")[i] for i in (0, 5, 19)])
    assert batch["target"].eq(1).any(), "the last block should be a short one"
    family = LanguageModelFamily(task.target_dictionary, 8, prefix_length=4)
    samples = family.draw(model.eval(), batch, 4)
    read = torch.cat([batch["net_input"]["src_tokens"][samples.sources, :5], samples.tokens[:, :-1]], 1)
    with torch.no_grad():
        logits = full_logits(model.decoder, model.decoder(read))[:, 4:]
    logits[..., task.target_dictionary.pad()] = -math.inf
    expected = logits.log_softmax(-1).gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(samples.log_q[samples.mask], expected[samples.mask], atol=1e-4)
    assert samples.mask[:8].all() and not samples.mask[8:].all()


@pytest.mark.parametrize("mode", ["eos", "complete"])
def test_sentences_train_too(text, tmp_path, mode):
    run = train_lm(text, tmp_path, *SHORT, "--sample-break-mode", mode)
    assert is_sound(run, 3) and [earm_keys(entry) for entry in run.log()] == [KEYS] * 3
    lengths = [entry["earm_negative_length"] for entry in run.log()]
    truncated = [entry["earm_truncated"] for entry in run.log()]
    if mode == "eos":
        assert all(1 < length < 6 for length in lengths) and 0 < sum(truncated) < 3
    else:
        assert truncated == [0, 0, 0]


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """Three updates with E-ARM in each."""
    return train_lm(text, tmp_path_factory.mktemp("plain"), *SHORT)


VARIANTS = [
    ["--earm-prefix-length", 5],
    ["--earm-negative-length", 12],
    ["--earm-energy-steps", "last"],
    ["--earm-negatives", 3, "--earm-normalizer", "source"],
    ["--earm-prefix-length", 2, "--ignore-prefix-size", 2],
    ["--add-bos-token", "--earm-prefix-length", 1, "--max-target-positions", 14],
]


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: " ".join(map(str, flags)))
def test_variants_train_each_in_its_own_way(text, tmp_path, plain, flags):
    run = train_lm(text, tmp_path, *SHORT, *flags)
    assert is_sound(run, 3) and [earm_keys(entry) for entry in run.log()] == [KEYS] * 3
    assert not same_state(run.checkpoint(), plain.checkpoint())


def test_the_control_samples_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModelFamily, "draw", None)
    run = train_lm(text, tmp_path, *SHORT, "--earm-control")
    assert is_sound(run, 3) and [earm_keys(entry) for entry in run.log()] == [{"earm_loss"}] * 3


@pytest.mark.parametrize("criterion", ["cross_entropy", "label_smoothed_cross_entropy"])
@pytest.mark.parametrize("arch", [ARCH, TIED], ids=["plain", "adaptive"])
def test_switched_off_it_trains_as_stock_does(text, tmp_path, criterion, arch):
    smoothing = ["--label-smoothing", 0.1] if criterion.startswith("label") else []
    stock = train(text, tmp_path / "stock", *TEXT, "--criterion", criterion, *smoothing, "--max-update", 4, arch=arch)
    off = ["--criterion", "earm_cross_entropy", "--earm-weight", 0, "--max-update", 4]
    ours = train_lm(text, tmp_path / "ours", *off, *smoothing, arch=arch)
    assert same_state(stock.checkpoint(), ours.checkpoint())
    figures = ("loss", "gnorm", "wpb", "bsz")
    assert [[entry[key] for key in figures] for entry in ours.log()] == [[entry[key] for key in figures] for entry in stock.log()]
    assert shapes(stock.checkpoint()) == shapes(ours.checkpoint())


# Five updates an epoch, or six on stock fairseq, which keeps the last batch; the warm-up spans two.
LONG = [
    "--criterion", "earm_cross_entropy", "--earm-negative-length", 6, "--earm-start-epoch", 2, "--earm-warmup-updates", 8,
    "--earm-normalizer-ema", 0.9, "--max-epoch", 3,
]


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    return train_lm(text, tmp_path_factory.mktemp("uninterrupted"), *LONG)


@pytest.mark.parametrize(
    "epochs, updates", [(0, 2), (1, 0), (1, 3)], ids=["before-the-start", "at-the-end-of-an-epoch", "within-an-epoch"]
)
def test_a_stopped_run_goes_on_as_if_never_stopped(text, tmp_path, uninterrupted, epochs, updates):
    total = len(uninterrupted.log())
    assert total in (15, 18)
    stop = epochs * (total // 3) + updates
    train_lm(text, tmp_path, *LONG, "--max-update", stop)
    resumed = train_lm(text, tmp_path, *LONG)
    assert len(resumed.log()) == total - stop
    assert same_state(resumed.checkpoint(), uninterrupted.checkpoint())


def perplexity_of(printed):
    return float(re.search(r"Perplexity: ([\d.]+)", printed).group(1))


def test_fairseq_measures_the_checkpoint_without_the_plugin(text, tmp_path, plain):
    where = [text.data, "--path", plain.folder / "checkpoint_last.pt", "--gen-subset", "test", "--cpu", "--num-workers", 0]
    blocks = ["--tokens-per-sample", 12, "--sample-break-mode", "none", "--required-batch-size-multiple", 1]
    found = perplexity_of(bare("eval_lm", tmp_path, *where, *blocks))
    model, task = load(plain)
    task.load_dataset("test")
    loss, count = 0.0, 0
    for i in range(len(task.dataset("test"))):
        batch = task.dataset("test").collater([task.dataset("test")[i]])
        with torch.no_grad():
            log_probs = model.eval().get_normalized_probs(model(**batch["net_input"]), log_probs=True)
        loss -= log_probs.gather(-1, batch["target"].unsqueeze(-1)).sum().item()
        count += batch["target"].numel()
    assert found == pytest.approx(math.exp(loss / count), abs=0.02)


def test_generation_and_validation_lose_nothing(text, plain):
    path = ["--path", plain.folder / "checkpoint_last.pt", "--cpu", "--num-workers", 0]
    task = ["--task", "earm_language_modeling", *SENTENCES, "--gen-subset", "test"]
    printed = command(
        "generate", text.data, *path, *task, "--max-len-b", 12, "--beam", 3, "--prefix-size", 1, "--no-progress-bar", "--batch-size", 16
    )
    assert len(tagged(printed, "H")) == 40
    assert all(len(hypotheses) == 1 for hypotheses in tagged(printed, "H").values())


def test_the_stock_task_names_the_one_to_take(text, tmp_path):
    with pytest.raises(UsageError, match="TransformerLanguageModel is none; for language models there is --task earm_language_modeling"):
        train(text, tmp_path, *TEXT, *FROM_THE_FIRST, arch=ARCH)


REFUSED = {
    "--earm-negative-length 0: give at least 1": ["--earm-negative-length", 0],
    "--earm-prefix-length -1: give at least 0": ["--earm-prefix-length", -1],
    "--earm-prefix-length 12: leaves nothing of --tokens-per-sample 12": ["--earm-prefix-length", 12],
    "--earm-energy-steps post: text has no last step": ["--earm-energy-steps", "post"],
    "--earm-sampler generator: language models have the ancestral one": ["--earm-sampler", "generator"],
    "--ignore-prefix-size 2: .* give --earm-prefix-length 2": ["--ignore-prefix-size", 2, "--earm-prefix-length", 1],
    "leave --self-target and --past-target out": ["--self-target"],
    "--add-bos-token: .* give --earm-prefix-length 1": ["--add-bos-token"],
    "--earm-negative-length 10: with --earm-prefix-length 3 it exceeds the 12 positions": [
        *SENTENCES, "--earm-negative-length", 10, "--earm-prefix-length", 3
    ],
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_work_is_one_line(text, tmp_path, says):
    with pytest.raises(UsageError, match=says) as error:
        train_lm(text, tmp_path, *FROM_THE_FIRST, *REFUSED[says])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.pt"))


def test_two_workers_learn_the_same(text, tmp_path):
    """Their blocks are not the same number, and one of them has a loss that is not finite."""
    flags = [*TASK, "--earm-negative-length", 6, "--batch-size", 16]
    printed, left = train_on_two(text, tmp_path, "legacy_ddp", *flags, arch=ARCH, FAULT="nan")
    assert printed.count("update skipped (1 skipped so far)") == 2
    first, second = (used_weights(worker["weights"]) for worker in left)
    assert all(torch.equal(first[name], second[name]) and bool(first[name].isfinite().all()) for name in first)
    assert '"earm_dv"' in printed
