"""Fixed-length sequences of binarised text."""
import shutil

import pytest
import torch
from fairseq.data import Dictionary, data_utils

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.blocks import load_blocks
from tests.tiny_translation import command


def load(text, split="train", **settings):
    dictionary = Dictionary.load(str(text.data / "dict.txt"))
    return load_blocks(str(text.data / split), dictionary, **{"sequence_length": 12, **settings})


def sentences(text, split="train"):
    dictionary = Dictionary.load(str(text.data / "dict.txt"))
    dataset = data_utils.load_indexed_dataset(str(text.data / split), dictionary)
    return [dataset[index] for index in range(len(dataset))]


def test_blocks_are_the_text_in_order_without_its_remainder(text):
    blocks = load(text)
    everything = torch.cat(sentences(text)).long()
    assert blocks.skipped == 1 and len(everything) % 12 and not blocks.cut.any()
    assert torch.equal(torch.cat([blocks[i] for i in range(len(blocks))]), everything[: len(everything) // 12 * 12])
    assert blocks[0].dtype == torch.long and blocks.sizes.tolist() == [12] * len(blocks)


def test_sentences_are_cut_or_skipped(text, caplog):
    caplog.set_level("INFO")
    long_enough = [s for s in sentences(text) if len(s) >= 6]
    blocks = load(text, sequence_length=6, break_mode="eos")
    assert [blocks[i].tolist() for i in range(len(blocks))] == [s[:6].tolist() for s in long_enough]
    assert blocks.skipped == 300 - len(long_enough) > 0
    assert blocks.cut.tolist() == [len(s) > 6 for s in long_enough] and 0 < blocks.cut.sum() < len(blocks)
    assert f"{len(blocks):,} sequences of 6 tokens; {blocks.skipped:,} shorter ones skipped; " in caplog.text
    assert f"; {blocks.cut.sum():,} longer sentences lost their end" in caplog.text


def test_pieces_are_read_together_when_asked(text, tmp_path):
    shutil.copytree(text.data, tmp_path / "data")
    for kind in ("bin", "idx"):
        shutil.copy(text.data / f"valid.{kind}", tmp_path / "data" / f"train1.{kind}")
    moved = type(text)(data=tmp_path / "data")
    tokens = sum(len(s) for split in ("train", "valid") for s in sentences(text, split))
    assert len(load(moved, combine=True)) == tokens // 12 > len(load(moved)) == len(load(text))


def test_the_format_that_is_read_ahead(text, tmp_path):
    where = ["--trainpref", text.folder / "train.txt", "--srcdict", text.data / "dict.txt", "--destdir", tmp_path]
    command("preprocess", "--only-source", *where, "--dataset-impl", "cached", "--workers", 1)
    blocks, expected = load(type(text)(data=tmp_path)), load(text)
    assert blocks.supports_prefetch and not expected.supports_prefetch
    blocks.prefetch([3, 4, 7])
    assert torch.equal(blocks[4], expected[4]) and torch.equal(blocks[7], expected[7])


def test_what_gives_no_sequence_is_said_in_one_line(text, tmp_path):
    with pytest.raises(UsageError, match="--sequence-length 5000: .*test has .* tokens") as error:
        load(text, "test", sequence_length=5000)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="--sequence-length 0"):
        load(text, sequence_length=0)
    with pytest.raises(UsageError, match="nosplit: there is no such split"):
        load(text, "nosplit")
    (tmp_path / "empty.txt").write_text("")
    where = ["--srcdict", text.data / "dict.txt", "--destdir", tmp_path / "empty", "--dataset-impl", "cached"]
    command("preprocess", "--only-source", "--trainpref", tmp_path / "empty.txt", *where, "--workers", 1)
    with pytest.raises(UsageError, match="train holds no text"):
        load(type(text)(data=tmp_path / "empty"))
    shutil.copytree(text.data, tmp_path / "data")
    (tmp_path / "data" / "train.idx").write_bytes((text.data / "train.idx").read_bytes()[:20])
    with pytest.raises(UsageError, match="train.idx or .bin is damaged"):
        load(type(text)(data=tmp_path / "data"))
