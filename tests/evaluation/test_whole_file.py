"""Files of results: whole or not there, one writer at a time."""
import multiprocessing
import os
import stat
import subprocess
import sys

import pytest

from fairseq_earm.cli.common import check_json, write_text
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation import whole_file as module
from fairseq_earm.evaluation.whole_file import whole_file
from tests.evaluation.racing import meanwhile


def test_until_all_is_written_the_former_file_stays(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("former")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "former"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_former_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "page.html"
    path.write_text("former")
    with pytest.raises(error), whole_file(path) as file:
        file.write(b"ne")
        raise error
    assert path.read_text() == "former" and os.listdir(tmp_path) == ["page.html"]


def test_what_a_killed_writer_left_is_taken_over(tmp_path):
    (tmp_path / "page.html.writing").write_text("much more than the new page has")
    write_text(str(tmp_path / "page.html"), "new")
    assert os.listdir(tmp_path) == ["page.html"] and (tmp_path / "page.html").read_text() == "new"


def write_second(path, refusals):
    try:
        write_text(path, "second")
    except UsageError as error:
        refusals.put(str(error))


def test_a_second_writer_is_refused_and_spoils_nothing(tmp_path):
    path = str(tmp_path / "page.html")
    context = multiprocessing.get_context("fork")
    refusals = context.SimpleQueue()
    with whole_file(path) as file:
        file.write(b"first")
        file.flush()
        other = context.Process(target=write_second, args=(path, refusals))
        other.start()
        other.join()
        message = refusals.get()
    assert f"--output {path} cannot be written: another process is writing it; wait for it, or end it" in message
    assert (tmp_path / "page.html").read_text() == "first" and os.listdir(tmp_path) == ["page.html"]


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    write_text(str(tmp_path / "link"), "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(str(tmp_path / "pipe"), "new")
    assert os.read(reader, 9) == b"new" and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    os.close(reader)


PRINTING = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("whole_file", {module.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("before")
with module.whole_file(sys.argv[1]) as file:
    file.write(b"written" + b"." * 9 + b"\\n")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("shell", ['"$@" | cat', '"$@" > file; cat file'], ids=["pipe", "file"])
def test_standard_output_keeps_what_else_is_printed(tmp_path, name, shell):
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", PRINTING, name]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("before\nwritten.........\nafter\n", "")
    assert os.listdir(tmp_path) in ([], ["file"])


def test_a_pipe_that_the_shell_opened_is_written_to(tmp_path):
    reader, writer = os.pipe()
    write_text(f"/dev/fd/{writer}", "new")
    assert os.read(reader, 9) == b"new"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("ends", [os.replace, lambda unfinished, path: os.remove(unfinished)], ids=["renames", "deletes"])
def test_another_writer_who_ends_between_opening_and_locking(tmp_path, monkeypatch, ends):
    path = tmp_path / "page.html"
    unfinished = tmp_path / "page.html.writing"
    unfinished.write_text("theirs")
    meanwhile(monkeypatch, lambda: ends(unfinished, path))
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert not path.exists() or path.read_text() == "theirs"
        assert unfinished.read_text() == "new"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["page.html"]


def test_a_full_device_is_one_line():
    check_json("/dev/full")
    with pytest.raises(UsageError, match="--json /dev/full cannot be written: No space left on device; make room"):
        write_text("/dev/full", "new", flag="--json")


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    for path, reason in (("none/page.html", "there is no such folder"), ("", "it is a folder")):
        with pytest.raises(UsageError, match=reason):
            check_json(str(tmp_path / path))
    check_json(str(tmp_path / "page.html"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write wherever the file system can
    with pytest.raises(UsageError, match=f"--json .*page.html cannot be written: {tmp_path} may not be written to"):
        check_json(str(tmp_path / "page.html"))
