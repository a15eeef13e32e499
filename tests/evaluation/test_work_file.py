"""Records that survive a kill, and what is said where they cannot be written."""
import builtins
import errno
import os

import pytest

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation import work_file
from fairseq_earm.evaluation.work_file import WorkFile


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out.json.partial"
    work = WorkFile(str(path), {"seed": 1}, flag="--json out.json")
    work.add({"index": 3, "base": [-1.0]})

    def full(name, mode="r", **kwargs):
        if mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return builtins.open(name, mode, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(work_file, "open", full, raising=False)
        with pytest.raises(UsageError) as error:
            work.add({"index": 5, "base": [-2.0]})
    message = str(error.value)
    assert "--json out.json" in message and "No space left" in message and "1 finished records are kept" in message
    assert "\n" not in message and list(work.records) == [3]
    assert WorkFile(str(path), {"seed": 1}, flag="--json out.json").records == {3: {"index": 3, "base": [-1.0]}}
