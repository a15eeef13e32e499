"""A tiny running text and models trained on it by stock commands: a language model and a masked one."""
from types import SimpleNamespace

import pytest

from tests.models.commands import LANGUAGE_MODEL, MASKED_LANGUAGE_MODEL, RESIDUAL_LANGUAGE_MODEL, train, write_text
from tests.tiny_translation import command


@pytest.fixture(scope="package")
def text(tmp_path_factory):
    """Folder, binarised data, checkpoints `lm`, `mlm` and `ralm`; the sizes are those of `networks.sizes`."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, {"train": 200, "valid": 30, "test": 30})
    splits = [f"--{split}pref={folder / split}.txt" for split in ("train", "valid", "test")]
    command("preprocess", "--only-source", *splits, "--destdir", folder / "data", "--workers", 1)
    data = folder / "data"
    lm = train(data, folder / "lm", *LANGUAGE_MODEL)
    mlm = train(data, folder / "mlm", *MASKED_LANGUAGE_MODEL)
    ralm = train(data, folder / "ralm", *RESIDUAL_LANGUAGE_MODEL, "--base-lm", lm)
    return SimpleNamespace(folder=folder, data=data, lm=lm, mlm=mlm, ralm=ralm)
