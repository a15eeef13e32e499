"""What holds for every family of models that is trained through `fairseq-train`: stock where E-ARM is off, exact resumes,
checkpoints that hold nothing of the plugin's."""
from __future__ import annotations

import pytest

from tests import tiny_images, tiny_language, tiny_translation
from tests.test_checkpoints import pickled_names
from tests.tiny_translation import same_state, train

LANGUAGE = [*tiny_language.TEXT, "--task", "earm_language_modeling", "--earm-negative-length", 5]
XL = [
    "--arch", "transformer_xl_lm", "--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 32,
    "--decoder-attention-heads", 2, "--mem-len", 6,
]
# Where the data is, the flags of the task, and those of the model.
FAMILIES = {
    "encoder-decoder": ("tiny", ["--task", "earm_translation"], tiny_translation.ARCH),
    "language model": ("text", LANGUAGE, tiny_language.ARCH),
    "transformer_xl": ("text", [*LANGUAGE, "--carry-memory", "--batch-size", 6], XL),
    "pixel_cnn": ("pictures", [*tiny_images.TASK, *tiny_images.SETTINGS], tiny_images.ARCH),
}
EARM = ["--criterion", "earm_cross_entropy", "--earm-start-update", 1, "--earm-weight", 0.5, "--earm-normalizer-ema", 0.5]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_images.build_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(params=FAMILIES)
def run(request, tmp_path):
    """(name, flags) → a short training of one family, in a folder of that name."""
    data, flags, arch = FAMILIES[request.param]
    found = request.getfixturevalue(data)
    return lambda name, *arguments: train(found, tmp_path / name, *flags, *arguments, arch=arch)


def test_switched_off_it_is_the_stock_criterion(run):
    stock = run("stock", "--criterion", "cross_entropy", "--max-update", 3)
    idle = run("idle", *EARM, "--earm-weight", 0, "--max-update", 3)
    assert same_state(stock.checkpoint(), idle.checkpoint())
    assert [entry["loss"] for entry in idle.log()] == [entry["loss"] for entry in stock.log()]


def test_a_stopped_run_goes_on_as_if_never_stopped(run):
    whole = run("whole", *EARM, "--max-epoch", 2)
    for stop in (["--max-update", 2], ["--max-epoch", 1], ["--max-epoch", 2]):
        parts = run("parts", *EARM, *stop)
    assert any("earm_dv" in entry for entry in whole.log())
    assert same_state(whole.checkpoint(), parts.checkpoint())


def test_the_checkpoint_is_made_of_what_stock_ones_are_made_of(run):
    stock, earm = (run(name, *flags, "--max-update", 2) for name, flags in (("stock", ["--criterion", "cross_entropy"]), ("earm", EARM)))
    names = [pickled_names(one.folder / "checkpoint_last.pt") for one in (stock, earm)]
    assert not {name for name in names[1] if "earm" in name}
    assert names[1] - names[0] <= {"torch.DoubleStorage", "torch.LongStorage"}  # of meters
    assert earm.checkpoint().keys() == stock.checkpoint().keys()
    assert earm.checkpoint()["extra_state"].keys() == stock.checkpoint()["extra_state"].keys()
    assert earm.checkpoint()["criterion"] is None
