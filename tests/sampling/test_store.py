"""Pre-generated negatives: what is written is what is read, or else an error of one line."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import shutil
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.blocks import load_blocks
from fairseq_earm.sampling.store import SETTINGS, SampleStore, chunk_starts, dictionary_hash, shard_sequences
from fairseq_earm.sampling.store_writer import StoreWriter

EXAMPLES = int(os.environ.get("FAIRSEQ_EARM_FUZZ", 400))
PREFIX, LENGTH, SAMPLES = 8, 12, 5
ENDINGS = ("bin", "idx", "json")


@pytest.fixture(scope="module")
def world(text):
    """The text's sequences, and the settings of a store for them; test is the split with 20 sequences or so."""
    dictionary = Dictionary.load(str(text.data / "dict.txt"))
    blocks = load_blocks(str(text.data / "test"), dictionary, sequence_length=LENGTH)
    made = {
        "split": "test", "dictionary_sha256": dictionary_hash(dictionary), "prefix_length": PREFIX, "sequence_length": LENGTH,
        "sample_break_mode": "none", "sequences": len(blocks), "text_sha256": blocks.fingerprint(), "checkpoint_sha256": "0" * 64,
        "samples": SAMPLES, "temperature": 1.0, "sampling_topk": -1, "sampling_topp": -1.0, "seed": 1, "batch_size": 3,
        "dtype": "float32", "device": "cpu", "num_shards": 1, "shard_id": 0,
    }
    assert len(blocks) % 3 and len(blocks) > 12
    return SimpleNamespace(data=text.data, dictionary=dictionary, blocks=blocks, settings=made)


def writer_of(world, path, **changes):
    return StoreWriter(str(path), {**world.settings, **changes}, checkpoint="base.pt", dictionary_size=len(world.dictionary))


def tokens_of(world, sequences):
    """What is "drawn" for these sequences here: numbers that tell sequences, samples and positions apart."""
    rows = [np.random.default_rng(index).integers(4, len(world.dictionary), (SAMPLES, LENGTH - PREFIX)) for index in sequences]
    return torch.from_numpy(np.stack(rows)).flatten(0, 1)


def write(world, path, chunks=None, **changes):
    """Write what is missing, at most so many chunks; how many were."""
    writer = writer_of(world, path, **changes)
    if writer.finished:
        return 0
    with writer:
        missing = writer.missing()[:chunks]
        for first in missing:
            writer.add(first, tokens_of(world, writer.chunk(first)))
        if not writer.missing():
            writer.finish()
    return len(missing)


def open_store(world, path, blocks=None, prefix_length=PREFIX, dictionary=None):
    dictionary = dictionary or world.dictionary
    return SampleStore.open(str(path), blocks or world.blocks, dictionary=dictionary, prefix_length=prefix_length)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Path of a finished store that no test changes."""
    path = tmp_path_factory.mktemp("store") / "test"
    write(world, path)
    return path


def files(path):
    """{name: content} of everything beside and beneath a path's folder."""
    folder = Path(path).parent
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def copy_of(path, folder):
    for ending in ENDINGS:
        shutil.copy(f"{path}.{ending}", folder)
    return folder / path.name


def refusal(act, *args, **kwargs):
    """The one line with which something is refused."""
    with pytest.raises(UsageError) as error:
        act(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_written_is_read(world, finished):
    store = open_store(world, finished)
    assert len(store) == len(world.blocks) and store.samples == SAMPLES and store.record["seed"] == 1
    for index in range(len(store)):
        assert torch.equal(store.all(index), tokens_of(world, [index]))
    assert store.all(0).dtype == torch.long and set(files(finished)) == {"test.bin", "test.idx", "test.json"}
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.all(5), store.all(5))
    for outside in (-1, len(store)):
        with pytest.raises(IndexError):
            store.all(outside)


def test_draws_are_uniform_and_never_the_same_twice(world, finished):
    store, rng = open_store(world, finished), np.random.default_rng(0)
    rows = [tuple(row) for row in store.all(7).tolist()]
    assert len(set(rows)) == SAMPLES
    counts = Counter()
    for _ in range(2000):
        drawn = [tuple(row) for row in store.draw(7, 2, rng).tolist()]
        assert len(set(drawn)) == 2 and set(drawn) <= set(rows)
        counts[drawn[0], drawn[1]] += 1
    # 20 ordered pairs, each 100 times: four standard deviations.
    assert len(counts) == 20 and all(60 < count < 140 for count in counts.values())
    assert sorted(map(tuple, store.draw(7, SAMPLES, rng).tolist())) == sorted(rows)
    assert "has 5 samples a prefix, too few for 6" in refusal(store.draw, 7, 6, rng)


def test_shards_hold_together_what_one_run_writes(world, finished, tmp_path):
    for shard in (2, 0, 1):
        write(world, tmp_path / "test", num_shards=3, shard_id=shard)
    parts = [(tmp_path / f"test.shard{shard}of3.bin").read_bytes() for shard in range(3)]
    assert b"".join(parts) == Path(f"{finished}.bin").read_bytes() and min(map(len, parts)) > 0
    store = open_store(world, tmp_path / "test")
    assert len(store) == len(world.blocks)
    assert all(torch.equal(store.all(index), tokens_of(world, [index])) for index in range(len(store)))


def test_every_sequence_is_in_one_chunk_of_one_shard():
    for sequences, batch_size, num_shards in [(10, 3, 1), (10, 3, 4), (100, 7, 15), (5, 9, 1), (12, 4, 2)]:
        made = {"sequences": sequences, "batch_size": batch_size, "num_shards": num_shards}
        shards = [{**made, "shard_id": shard} for shard in range(num_shards)]
        assert [index for shard in shards for index in shard_sequences(shard)] == list(range(sequences))
        assert [first for shard in shards for first in chunk_starts(shard)] == list(range(0, sequences, batch_size))
        assert all(len(shard_sequences(shard)) > 0 for shard in shards)


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


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["fsync", "replace", "remove", "rmdir"])
def test_killed_at_any_step_the_output_is_the_same(world, finished, tmp_path, monkeypatch, name, after):
    with monkeypatch.context() as patch:
        calls = killed_at(patch, name, -1, after)
        write(world, tmp_path / "count" / "test")
    assert calls[0] >= 1
    for number in range(1, calls[0] + 1):
        path = tmp_path / str(number) / "test"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, name, number, after)
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


def test_where_nothing_can_be_written_is_one_line(world, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in refusal(write, world, tmp_path / "file" / "test")


def test_a_finished_shard_that_was_damaged_is_not_called_finished(world, finished, tmp_path):
    path = copy_of(finished, tmp_path)
    os.truncate(f"{path}.bin", 10)
    assert "test.bin has 10 bytes" in refusal(writer_of, world, path)


def test_samples_for_other_data_are_refused(world, finished):
    dictionary = Dictionary.load(str(world.data / "dict.txt"))
    dictionary.add_symbol("new")
    assert "dictionary is another" in refusal(open_store, world, finished, dictionary=dictionary)
    assert "--prefix-length 8, here it is 7" in refusal(open_store, world, finished, prefix_length=7)
    longer = load_blocks(str(world.data / "test"), world.dictionary, sequence_length=14)
    assert "--sequence-length 12, here it is 14" in refusal(open_store, world, finished, longer)
    more = load_blocks(str(world.data / "valid"), world.dictionary, sequence_length=LENGTH)
    assert f"number of sequences in the data {len(world.blocks)}" in refusal(open_store, world, finished, more)


def test_other_text_of_the_same_size_is_refused(world, finished, tmp_path):
    shutil.copytree(world.data, tmp_path / "data")
    data = bytearray((tmp_path / "data" / "test.bin").read_bytes())
    data[0] = 5 if data[0] == 4 else 4
    (tmp_path / "data" / "test.bin").write_bytes(data)
    other = load_blocks(str(tmp_path / "data" / "test"), world.dictionary, sequence_length=LENGTH)
    assert len(other) == len(world.blocks)
    assert "the text is another one" in refusal(open_store, world, finished, other)


def test_missing_and_mixed_shards_are_named(world, finished, tmp_path):
    path = tmp_path / "test"
    assert "do not exist" in refusal(open_store, world, path)
    assert "do not exist" in refusal(open_store, world, tmp_path / "no" / "where")
    for shard in (0, 2):
        write(world, path, num_shards=3, shard_id=shard)
    message = refusal(open_store, world, path)
    assert "shard 1 of 3 is missing" in message and "--num-shards 3 --shard-id 1" in message
    shutil.copy(tmp_path / "test.shard0of3.json", tmp_path / "test.shard1of3.json")
    assert "is the record of shard 0 of 3" in refusal(open_store, world, path)
    os.remove(tmp_path / "test.shard1of3.json")
    write(world, path, num_shards=3, shard_id=1, seed=2)
    assert "shards 0 and 1 differ in --seed" in refusal(open_store, world, path)
    copy_of(finished, tmp_path)
    assert "in 1 and in 3 shards" in refusal(open_store, world, path)


def test_absurd_names_of_shards_cost_nothing(world, tmp_path):
    (tmp_path / "test.shard0of999999999.json").write_text("{}")
    assert "shard 1 of 999999999 is missing" in refusal(open_store, world, tmp_path / "test")


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_missing_file_is_named(world, finished, tmp_path, ending):
    path = copy_of(finished, tmp_path)
    os.remove(f"{path}.{ending}")
    assert f"test.{ending} cannot be read" in refusal(open_store, world, path)


def with_checksums(path):
    """Make the record agree with its files, as no accident does."""
    record = json.loads(Path(f"{path}.json").read_text())
    for ending in ("bin", "idx"):
        record[f"{ending}_crc32"] = zlib.crc32(Path(f"{path}.{ending}").read_bytes())
    Path(f"{path}.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "ending, at, data",
    [("idx", 18, b"\xff" * 8), ("idx", 17, b"\x63"), ("idx", 0, b"x"), ("idx", 26, b"\xff\xff\xff\x7f"), ("bin", 4, b"\xff\xff")],
)
def test_files_made_to_deceive_are_refused(world, finished, tmp_path, ending, at, data):
    path = copy_of(finished, tmp_path)
    content = bytearray(Path(f"{path}.{ending}").read_bytes())
    content[at : at + len(data)] = data
    Path(f"{path}.{ending}").write_bytes(content)
    with_checksums(path)
    assert f"test.{ending}" in refusal(open_store, world, path)


def damaged(content, draw):
    """Bytes that something happened to."""
    at = draw(st.integers(0, len(content) - 1))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "replace"]))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=20)) + content[at:]
    if kind == "remove":
        return content[:at] + content[at + draw(st.integers(1, 20)) :]
    return draw(st.binary(max_size=200))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([2**70, -1, 0, "1" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def damaged_record(content, draw):
    """A record in which one value is another, or missing, or one too many."""
    record = json.loads(content)
    name = draw(st.sampled_from([*record, "more"]))
    if draw(st.booleans()):
        record.pop(name, None)
    else:
        record[name] = draw(JSON)
    return json.dumps(record).encode()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_found_or_harmless(world, finished, tmp_path, data):
    path = copy_of(finished, tmp_path)
    ending = data.draw(st.sampled_from([*ENDINGS, "values"]))
    file = Path(f"{path}.json" if ending == "values" else f"{path}.{ending}")
    before = file.read_bytes()
    after = (damaged_record if ending == "values" else damaged)(before, data.draw)
    file.write_bytes(after)
    try:
        store = open_store(world, path)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    # A digit of the seed in the record, say: the samples are those that were written.
    assert after == before or file.suffix == ".json"
    assert all(torch.equal(store.all(index), tokens_of(world, [index])) for index in range(len(world.blocks)))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"[" * 60000, b"\xff\xfe", b"9" * 9000, b"{}" + b" " * 70000, b'{"format": 1}'],
)
def test_records_that_are_none_are_refused(world, finished, tmp_path, content):
    path = copy_of(finished, tmp_path)
    Path(f"{path}.json").write_bytes(content)
    assert "test.json" in refusal(open_store, world, path)
    assert "test.json" in refusal(writer_of, world, path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "true", "1", '"1.0"', "0.0", "-1.0"])
def test_a_temperature_that_is_none_is_refused(world, finished, tmp_path, value):
    path = copy_of(finished, tmp_path)
    record = Path(f"{path}.json").read_text()
    assert '"temperature": 1.0,' in record
    Path(f"{path}.json").write_text(record.replace('"temperature": 1.0,', f'"temperature": {value},'))
    assert "temperature is" in refusal(open_store, world, path)
