import os
from pathlib import Path

import pytest
import torch

import fairseq_earm  # noqa: F401  (mends the installed versions)
from fairseq_earm.compat_versions import warn_once
from tests import tiny_energy, tiny_language, tiny_logs, tiny_translation

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir():
    """Folder of real data; tests that need it are skipped where FAIRSEQ_EARM_DATA does not name one."""
    folder = os.environ.get("FAIRSEQ_EARM_DATA")
    if not folder:
        pytest.skip("FAIRSEQ_EARM_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Binarised parallel text and two models trained on it, see `tiny_translation.build`."""
    return tiny_translation.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def adaptive(tiny, tmp_path_factory):
    """A run on `tiny`'s text whose model has an adaptive softmax, see `tiny_translation.build_adaptive`."""
    return tiny_translation.build_adaptive(tiny, tmp_path_factory.mktemp("adaptive"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Binarised monolingual text and a language model trained on it, see `tiny_language.build_text`."""
    return tiny_language.build_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def energy(text, tmp_path_factory):
    """Checkpoint of an energy network trained on the residual of `text.base`, see `tiny_energy.build_energy`."""
    return tiny_energy.build_energy(text, tmp_path_factory.mktemp("energy"))


@pytest.fixture(scope="session")
def logged(tiny, tmp_path_factory):
    """A run on `tiny`'s text with all of fairseq's logs, see `tiny_logs.build`."""
    return tiny_logs.build(tiny, tmp_path_factory.mktemp("logged"))


@pytest.fixture
def warnings(caplog):
    """The plugin's warnings, those given before forgotten."""
    warn_once.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "fairseq_earm"]
    warn_once.cache_clear()
