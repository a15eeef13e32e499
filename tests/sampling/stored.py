"""A store of a little text's continuations, as tests write and read it."""
from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.blocks import load_blocks
from fairseq_earm.sampling.store import SampleStore
from fairseq_earm.sampling.store_settings import dictionary_hash
from fairseq_earm.sampling.store_writer import StoreWriter

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
