"""Records that survive a kill, and what is said where they cannot be written."""
import errno
import multiprocessing
import os
from types import SimpleNamespace

import pytest

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.work_file import WorkFile, open_work
from tests.evaluation.racing import meanwhile


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out.json.partial"
    with WorkFile(str(path), {"seed": 1}, flag="--json out.json") as work:
        work.add({"index": 3, "base": [-1.0]})

        def full(line):
            os.write(work._file.fileno(), line[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        whole = work._file
        with monkeypatch.context() as patch:
            patch.setattr(work, "_file", SimpleNamespace(write=full, fileno=whole.fileno))
            with pytest.raises(UsageError) as error:
                work.add({"index": 5, "base": [-2.0]})
        message = str(error.value)
        assert "--json out.json" in message and "No space left" in message and "1 finished records are kept" in message
        assert "\n" not in message and list(work.records) == [3]
    with open_work(str(path)[: -len(".partial")], {"seed": 1}) as again:
        assert again.records == {3: {"index": 3, "base": [-1.0]}}


def open_second(path, refusals):
    try:
        open_work(path, {})
        refusals.put("not refused")
    except UsageError as error:
        refusals.put(str(error))


def test_two_processes_cannot_write_the_same(tmp_path):
    with open_work(str(tmp_path / "out.json"), {}) as work:
        work.add({"index": 3})
        context = multiprocessing.get_context("fork")
        refusals = context.SimpleQueue()
        other = context.Process(target=open_second, args=(str(tmp_path / "out.json"), refusals))
        other.start()
        other.join()
        message = refusals.get()
        assert "out.json.partial cannot be written: another process is writing it; wait for it, or end it" in message
    with open_work(str(tmp_path / "out.json"), {}) as again:
        assert again.records == {3: {"index": 3}}


def test_a_refused_file_may_be_opened_afresh(tmp_path):
    with WorkFile(str(tmp_path / "file"), {"seed": 1}, flag="--json"):
        pass
    with pytest.raises(UsageError, match="another seed"):
        WorkFile(str(tmp_path / "file"), {"seed": 2}, flag="--json")
    with WorkFile(str(tmp_path / "file"), {"seed": 1}, flag="--json") as work:
        work.remove()
    assert not list(tmp_path.iterdir())


def test_another_process_that_ends_between_opening_and_locking(tmp_path, monkeypatch):
    path = tmp_path / "out.json.partial"
    meanwhile(monkeypatch, path.unlink)
    with open_work(str(tmp_path / "out.json"), {}) as work:
        work.add({"index": 3})
        assert b'"index": 3' in path.read_bytes()
        path.unlink()
        work.remove()


def test_a_pipe_has_no_work_file():
    with open_work("/dev/stdout", {}) as work:
        assert work is None
