"""Files of results: whole or not there, one writer at a time."""
import multiprocessing
import os
import stat

import pytest

from fairseq_earm.cli.common import check_json, write_text
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.whole_file import whole_file


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
