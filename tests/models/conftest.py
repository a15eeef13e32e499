"""A tiny running text and models trained on it by stock commands: a language model and a masked one."""
from types import SimpleNamespace

import pytest

from tests.models.commands import LANGUAGE_MODEL, MASKED_LANGUAGE_MODEL, train, write_text
from tests.tiny_translation import command


@pytest.fixture(scope="package")
def text(tmp_path_factory):
    """Folder, binarised data, `lm` and `mlm` checkpoints; the language model's sizes are those of `networks.sizes`."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, {"train": 200, "valid": 30, "test": 30})
    splits = [f"--{split}pref={folder / split}.txt" for split in ("train", "valid", "test")]
    command("preprocess", "--only-source", *splits, "--destdir", folder / "data", "--workers", 1)
    data = folder / "data"
    lm = train(data, folder / "lm", *LANGUAGE_MODEL)
    mlm = train(data, folder / "mlm", *MASKED_LANGUAGE_MODEL)
    return SimpleNamespace(folder=folder, data=data, lm=lm, mlm=mlm)
