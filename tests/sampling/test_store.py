"""Pre-generated negatives: what was written is what is read, or else an error of one line."""
from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.blocks import load_blocks
from fairseq_earm.sampling.store_settings import chunk_starts, shard_sequences
from tests.sampling.stored import (  # noqa: F401
    ENDINGS, LENGTH, PREFIX, SAMPLES, copy_of, files, finished, open_store, refusal, tokens_of, world, write, writer_of,
)

EXAMPLES = int(os.environ.get("FAIRSEQ_EARM_FUZZ", 400))


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
