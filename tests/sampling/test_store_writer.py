"""Writing pre-generated negatives: killed at any step, the output is the same; refused, nothing is lost."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import zlib
from types import SimpleNamespace

import pytest

from fairseq_earm.sampling import store_writer
from fairseq_earm.sampling.store_settings import SETTINGS, chunk_starts
from tests.evaluation.racing import meanwhile
from tests.sampling.stored import copy_of, files, finished, open_store, refusal, tokens_of, world, write, writer_of  # noqa: F401


@pytest.mark.parametrize("chunks", [1, 2, 6])
def test_goes_on_after_some_chunks(world, finished, tmp_path, chunks):
    total = len(chunk_starts(world.settings))
    assert write(world, tmp_path / "test", chunks) == chunks
    assert "test.json" not in files(tmp_path / "test")
    assert "unfinished" in refusal(open_store, world, tmp_path / "test")
    assert write(world, tmp_path / "test") == total - chunks
    assert files(tmp_path / "test") == files(finished)
    assert write(world, tmp_path / "test") == 0


class Killed(BaseException):
    """What nothing catches."""


def killed_at(monkeypatch, name, number, after):
    """os.<name> raises `Killed` at its call of this number, before or after it does its work."""
    original, calls = getattr(os, name), [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number and not after:
            raise Killed
        original(*args, **kwargs)
        if calls[0] == number:
            raise Killed

    monkeypatch.setattr(os, name, call)
    return calls


def torn_at(monkeypatch, _, number, after):
    """The writing of a file raises `Killed` at its call of this number, with half of it or all of it on disk."""
    calls = [0]

    def opened(path, mode="r"):
        file = open(path, mode)
        if mode == "wb":
            file = SimpleNamespace(write=functools.partial(tear, file.write), flush=file.flush, fileno=file.fileno, close=file.close)
            return contextlib.closing(file)
        return file

    def tear(write_all, data):
        calls[0] += 1
        write_all(data[: len(data) // 2] if calls[0] == number and not after else data)
        if calls[0] == number:
            raise Killed

    monkeypatch.setattr(store_writer, "open", opened, raising=False)
    return calls


STEPS = {"fsync": killed_at, "replace": killed_at, "remove": killed_at, "rmdir": killed_at, "write": torn_at}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_killed_at_any_step_the_output_is_the_same(world, finished, tmp_path, monkeypatch, name, after):
    """Also in a run that goes on after another one."""
    kill = STEPS[name]
    with monkeypatch.context() as patch:
        write(world, tmp_path / "count" / "test", 2)
        calls = kill(patch, name, -1, after)
        write(world, tmp_path / "count" / "test")
    assert calls[0] >= 1
    for number in range(1, calls[0] + 1):
        path = tmp_path / str(number) / "test"
        write(world, path, 2)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill(patch, name, number, after)
            write(world, path)
        left = writer_of(world, path)
        if left.finished:
            left.remove_parts()
        else:
            write(world, path)
        assert files(path) == files(finished), (name, number)


def test_a_part_cut_short_is_drawn_again(world, finished, tmp_path):
    write(world, tmp_path / "test", 3)
    part = tmp_path / "test.parts" / "part-3"
    part.write_bytes(part.read_bytes()[:-1])
    assert write(world, tmp_path / "test") == len(chunk_starts(world.settings)) - 2
    assert files(tmp_path / "test") == files(finished)


@pytest.mark.parametrize("damage", ["a bit", "the checksum", "another's", "an earlier version's"])
def test_a_damaged_part_is_drawn_again_and_spoken_of_once(world, finished, tmp_path, damage, caplog):
    write(world, tmp_path / "test", 3)
    part = tmp_path / "test.parts" / "part-3"
    data = bytearray(part.read_bytes())
    data[{"a bit": 7, "the checksum": -1}.get(damage, 0)] ^= 1 if damage in ("a bit", "the checksum") else 0
    if damage == "another's":
        data = part.with_name("part-6").read_bytes()
    part.write_bytes(data[:-4] if damage == "an earlier version's" else data)
    assert write(world, tmp_path / "test") == len(chunk_starts(world.settings)) - 2
    assert files(tmp_path / "test") == files(finished)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{part}: damaged, or of other settings or another version; drawn again"]


def test_all_damaged_parts_are_one_line(world, finished, tmp_path, caplog):
    write(world, tmp_path / "test", 4)
    for part in (tmp_path / "test.parts").glob("part-*"):
        os.truncate(part, 5)
    assert write(world, tmp_path / "test") == len(chunk_starts(world.settings))
    assert files(tmp_path / "test") == files(finished)
    [said] = [record.getMessage() for record in caplog.records]
    assert "part-0 and 3 more: damaged" in said


def test_a_part_that_is_damaged_after_it_was_checked_is_not_taken_over(world, finished, tmp_path):
    starts = chunk_starts(world.settings)
    with writer_of(world, tmp_path / "test") as writer:
        for first in starts:
            writer.add(first, tokens_of(world, writer.chunk(first)))
        part = tmp_path / "test.parts" / "part-6"
        part.write_bytes(part.read_bytes()[:-5] + b"12345")
        assert writer.missing() == []
        assert "part-6 is damaged: start the same command again" in refusal(writer.finish)
    assert write(world, tmp_path / "test") == 1
    assert files(tmp_path / "test") == files(finished)


OTHER = {
    "split": "valid", "dictionary_sha256": "1" * 64, "prefix_length": 7, "sequence_length": 13, "sample_break_mode": "eos",
    "sequences": 9, "text_sha256": "1" * 64, "checkpoint_sha256": "1" * 64, "samples": 6, "temperature": 2.0, "sampling_topk": 3,
    "sampling_topp": 0.5, "seed": 2, "batch_size": 4, "dtype": "float16", "device": "cuda",
}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_refused_by_name(world, finished, tmp_path, name):
    write(world, tmp_path / "test", 1)
    before = files(tmp_path / "test")
    for path in (tmp_path / "test", finished):
        message = refusal(writer_of, world, path, **{name: OTHER[name]})
        assert "made with other settings: " + SETTINGS[name].flag in message and "delete" in message
        if not name.endswith("sha256"):
            assert f"{world.settings[name]}, this is {OTHER[name]};" in message
    assert files(tmp_path / "test") == before


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("chunks", [1, None])
def test_other_settings_are_refused_by_name_where_another_process_was_faster(world, tmp_path, name, chunks):
    """Both had looked before one of them wrote; it left some parts, or all of the samples."""
    first, second = writer_of(world, tmp_path / "test"), writer_of(world, tmp_path / "test", **{name: OTHER[name]})
    write(world, tmp_path / "test", chunks)
    before = files(tmp_path / "test")
    message = refusal(second.__enter__)
    where = tmp_path / ("test.parts" if chunks else "test.json")
    assert f"{where} was made with other settings: {SETTINGS[name].flag}" in message and f"or delete {where}" in message
    assert files(tmp_path / "test") == before
    with first:
        assert len(first.missing()) == (len(chunk_starts(world.settings)) - 1 if chunks else 0)


def test_the_first_difference_is_named(world, finished):
    assert "--samples 5, this is 9" in refusal(writer_of, world, finished, seed=7, samples=9)


def test_every_setting_was_compared():
    assert set(OTHER) | {"num_shards", "shard_id"} == set(SETTINGS)


def test_settings_without_a_finished_chunk_may_change(world, tmp_path):
    write(world, tmp_path / "test", 0)
    write(world, tmp_path / "test", seed=2)
    assert open_store(world, tmp_path / "test").record["seed"] == 2


def test_nothing_that_is_not_ours_is_overwritten_or_removed(world, tmp_path):
    (tmp_path / "a.bin").write_text("mine")
    assert "a.bin exists" in refusal(writer_of, world, tmp_path / "a")
    (tmp_path / "b.parts").mkdir()
    (tmp_path / "b.parts" / "notes").write_text("mine")
    write(world, tmp_path / "b")
    assert [name.name for name in (tmp_path / "b.parts").iterdir()] == ["notes"]


def test_two_processes_cannot_write_the_same(world, tmp_path):
    write(world, tmp_path / "test", 1)
    with open(tmp_path / "test.parts" / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in refusal(write, world, tmp_path / "test")
    assert write(world, tmp_path / "test") > 0


def test_what_another_process_finished_meanwhile_is_left_alone(world, finished, tmp_path):
    writer = writer_of(world, tmp_path / "test")
    write(world, tmp_path / "test")
    inode = os.stat(tmp_path / "test.bin").st_ino
    with writer:
        assert writer.finished and writer.missing() == []
        writer.finish()
    assert files(tmp_path / "test") == files(finished) and not (tmp_path / "test.parts").exists()
    assert os.stat(tmp_path / "test.bin").st_ino == inode


def test_what_another_process_damaged_meanwhile_is_not_called_finished(world, finished, tmp_path):
    writer = writer_of(world, tmp_path / "test")
    os.truncate(f"{copy_of(finished, tmp_path)}.bin", 10)
    assert "test.bin has 10 bytes" in refusal(writer.__enter__)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_lock_that_its_holder_removed_keeps_nobody_out(world, tmp_path, monkeypatch, seed):
    """The other process finishes, and removes its files, after this one opened the lock and before it locks it."""
    writer = writer_of(world, tmp_path / "test", seed=seed)
    meanwhile(monkeypatch, lambda: write(world, tmp_path / "test"))
    if seed == 1:
        with writer:
            assert writer.missing() == []
    else:
        assert "test.json was made with other settings: --seed 1, this is 2" in refusal(writer.__enter__)
    assert sorted(files(tmp_path / "test")) == ["test.bin", "test.idx", "test.json"]


def test_the_lock_is_the_one_that_others_see(world, tmp_path, monkeypatch):
    """Here the other process's work is deleted too, so that there is everything to do."""
    writer = writer_of(world, tmp_path / "test")
    (tmp_path / "test.parts").mkdir()
    meanwhile(monkeypatch, lambda: os.remove(tmp_path / "test.parts" / "lock"))
    with writer:
        assert "another process" in refusal(write, world, tmp_path / "test")


def test_the_files_of_others_that_came_meanwhile_are_not_overwritten(world, tmp_path):
    writer = writer_of(world, tmp_path / "test")
    (tmp_path / "test.bin").write_text("mine")
    assert "test.bin exists" in refusal(writer.__enter__)
    assert "test.bin exists" in refusal(writer_of, world, tmp_path / "test")
    assert (tmp_path / "test.bin").read_text() == "mine"


def test_a_folder_of_parts_that_is_removed_meanwhile_is_none(world, tmp_path, monkeypatch):
    """As by another process that finishes."""
    write(world, tmp_path / "test", 1)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    shutil.rmtree(tmp_path / "test.parts")
    writer = writer_of(world, tmp_path / "test")
    assert writer.missing() == list(chunk_starts(world.settings))
    writer.remove_parts()


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"samples", "prefix_length", "sequence_length"}))
def test_a_part_of_other_settings_is_drawn_again(world, finished, tmp_path, name, caplog):
    """A part of the same size came into a folder that says what it has."""
    write(world, tmp_path / "test", 3)
    part = tmp_path / "test.parts" / "part-3"
    with writer_of(world, tmp_path / "other", **{name: OTHER[name]}) as other:
        other.add(3, tokens_of(world, range(3, 6)))
    shutil.copy(tmp_path / "other.parts" / "part-3", part)
    shutil.rmtree(tmp_path / "other.parts")
    assert write(world, tmp_path / "test") == len(chunk_starts(world.settings)) - 2
    assert files(tmp_path / "test") == files(finished)
    assert [record.getMessage() for record in caplog.records] == [
        f"{part}: damaged, or of other settings or another version; drawn again"
    ]


def as_by_version_0_1(part):
    """A part with the checksum that version 0.1 gave it, which has nothing of the settings."""
    data = part.read_bytes()[:-4]
    part.write_bytes(data + zlib.crc32(part.name.encode() + data).to_bytes(4, "little"))


def test_goes_on_after_version_0_1(world, finished, tmp_path, caplog):
    write(world, tmp_path / "test", 3)
    for part in (tmp_path / "test.parts").glob("part-*"):
        as_by_version_0_1(part)
    assert "--seed 1, this is 2" in refusal(writer_of, world, tmp_path / "test", seed=2)
    assert write(world, tmp_path / "test") == len(chunk_starts(world.settings)) - 3
    assert files(tmp_path / "test") == files(finished) and not caplog.records


def test_a_full_disk_is_one_line_and_loses_nothing(world, finished, tmp_path, monkeypatch):
    write(world, tmp_path / "test", 2)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = refusal(write, world, tmp_path / "test")
    assert "--output" in message and "No space left on device" in message
    assert write(world, tmp_path / "test") == len(chunk_starts(world.settings)) - 2
    assert files(tmp_path / "test") == files(finished)


def test_a_record_that_cannot_be_read_is_one_line(world, tmp_path):
    (tmp_path / "test.json").mkdir()
    assert "test.json cannot be read: Is a directory" in refusal(writer_of, world, tmp_path / "test")


def test_where_nothing_can_be_written_is_one_line(world, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in refusal(write, world, tmp_path / "file" / "test")


def test_a_finished_shard_that_was_damaged_is_not_called_finished(world, finished, tmp_path):
    path = copy_of(finished, tmp_path)
    os.truncate(f"{path}.bin", 10)
    assert "test.bin has 10 bytes" in refusal(writer_of, world, path)
