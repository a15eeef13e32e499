"""The README's lines for each kind of model run as they stand, on tiny data."""
import re
import shlex
from pathlib import Path

import pytest

from tests import tiny_images
from tests.tiny_translation import command

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
[BLOCK] = re.findall(r"<!-- families: begin -->(.*)<!-- families: end -->", README, re.DOTALL)
LINES = re.findall(r"^fairseq-train (?:.*\\\n)*.*$", BLOCK, re.MULTILINE)
SMALL = ["--batch-size", 4, "--max-update", 1, "--cpu", "--num-workers", 0, "--disable-validation", "--no-progress-bar"]


@pytest.fixture(scope="module")
def folders(tiny, text, tmp_path_factory):
    pictures = tiny_images.build_images(tmp_path_factory.mktemp("pictures"))
    return {"data-bin/pairs": tiny.data, "data-bin/text": text.data, "data/mnist": pictures.data}


def test_there_is_a_line_for_every_row():
    tasks = re.findall(r"^\|[^|]*\| `(earm_\w+(?: --carry-memory)?)`", BLOCK, re.MULTILINE)
    assert len(tasks) == 4 and [re.search(task, line) is not None for task, line in zip(tasks, LINES)] == [True] * 4


@pytest.mark.parametrize("line", LINES, ids=lambda line: re.search(r"--arch (\w+)", line)[1])
def test_it_runs(line, folders, tmp_path):
    _, data, *flags = shlex.split(line.replace("\\\n", " "))
    del flags[flags.index("--user-dir") : flags.index("--user-dir") + 2]
    blocks = ["--tokens-per-sample", 24] if "--tokens-per-sample" in flags else []
    command("train", folders[data], *flags, *SMALL, *blocks, "--save-dir", tmp_path)
    assert (tmp_path / "checkpoint_last.pt").exists()
