"""fairseq-earm-sample from flags to files: what it draws, and that killing it changes nothing."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary

from fairseq_earm.cli import sample
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.base_lm import load_base_lm
from fairseq_earm.sampling.blocks import load_blocks
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.sampling.scoring import decoder_input
from fairseq_earm.sampling.store import SampleStore
from tests.tiny_translation import command

PREFIX, LENGTH = 8, 12
LENGTHS = ["--prefix-length", PREFIX, "--sequence-length", LENGTH]


def arguments(text, output, *more, split="valid"):
    where = [text.data, "--path", text.base, "--output", output, "--gen-subset", split]
    return [str(value) for value in [*where, *LENGTHS, "--samples", 4, "--batch-size", 4, "--cpu", *more]]


def run(text, output, *more, **split):
    sample.main(arguments(text, output, *more, **split))


def opened(text, output, split="valid"):
    dictionary = Dictionary.load(str(text.data / "dict.txt"))
    blocks = load_blocks(str(text.data / split), dictionary, sequence_length=LENGTH)
    return blocks, SampleStore.open(str(Path(output) / split), blocks, dictionary=dictionary, prefix_length=PREFIX)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def refusal(*args, **kwargs):
    with pytest.raises(UsageError) as error:
        run(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """What an uninterrupted run writes about the validation set."""
    folder = tmp_path_factory.mktemp("whole")
    run(text, folder)
    return folder


def base_of(text):
    dictionary = Dictionary.load(str(text.data / "dict.txt"))
    data = Namespace(source_dictionary=dictionary, target_dictionary=dictionary, args=Namespace(data=str(text.data)))
    return dictionary, load_base_lm(str(text.base), data, flag="--path", sequence_length=LENGTH).model


def test_each_prefix_has_its_own_continuations(text, tmp_path):
    """With one candidate a token, every sample is the likeliest token after the likeliest token, found without a cache."""
    run(text, tmp_path, "--sampling-topk", 1)
    blocks, store = opened(text, tmp_path)
    dictionary, model = base_of(text)
    tokens = torch.stack([blocks[index] for index in range(len(blocks))])[:, :PREFIX]
    for _ in range(LENGTH - PREFIX):
        read = torch.cat([decoder_input(tokens, dictionary.eos()), tokens[:, -1:]], 1)
        logits = model.decoder(read)[0][:, -1]
        logits[:, dictionary.pad()] = -float("inf")
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    expected = tokens[:, PREFIX:].unsqueeze(1).expand(-1, 4, -1)
    assert torch.equal(torch.stack([store.all(index) for index in range(len(store))]), expected)
    assert len({tuple(row) for row in tokens[:, PREFIX:].tolist()}) > 1


def test_samples_and_record_say_what_was_asked(text, whole, tmp_path):
    assert set(contents(whole)) == {"valid.bin", "valid.idx", "valid.json"}
    blocks, store = opened(text, whole)
    assert (len(store), store.samples) == (len(blocks), 4) and store.all(0).shape == (4, LENGTH - PREFIX)
    record = store.record
    assert (record["seed"], record["split"], record["sequences"], record["device"]) == (1, "valid", len(blocks), "cpu")
    assert record["checkpoint"] == str(text.base) and record["temperature"] == 1.0
    rows = {tuple(row) for index in range(len(store)) for row in store.all(index).tolist()}
    assert len(rows) > len(store)
    for more in (["--seed", 2], ["--temperature", 3], ["--sampling-topp", 0.3]):
        run(text, tmp_path / more[0], *more)
        assert contents(tmp_path / more[0])["valid.bin"] != contents(whole)["valid.bin"]


def test_two_splits_share_a_folder(text, tmp_path):
    run(text, tmp_path)
    run(text, tmp_path, split="test")
    for split in ("valid", "test"):
        assert len(opened(text, tmp_path, split)[1]) > 0


def test_shards_draw_what_one_run_draws(text, whole, tmp_path):
    for shard in range(3):
        run(text, tmp_path, "--num-shards", 3, "--shard-id", shard)
    _, store = opened(text, tmp_path)
    _, expected = opened(text, whole)
    assert all(torch.equal(store.all(index), expected.all(index)) for index in range(len(expected)))


def test_data_read_ahead_draws_the_same(text, whole, tmp_path):
    where = ["--validpref", text.folder / "valid.txt", "--srcdict", text.data / "dict.txt", "--destdir", tmp_path / "data"]
    command("preprocess", "--only-source", *where, "--dataset-impl", "cached", "--workers", 1)
    run(Namespace(data=tmp_path / "data", base=text.base), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("chunks", [0, 1, 3, 7])
def test_goes_on_after_an_exception(text, whole, tmp_path, monkeypatch, capsys, chunks):
    original, calls = ContinuationSampler.__call__, []

    def broken(self, *args, **kwargs):
        if len(calls) == chunks:
            raise RuntimeError("as if the machine had failed")
        calls.append(1)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(ContinuationSampler, "__call__", broken)
        run(text, tmp_path)
    again, bars = [], []
    with monkeypatch.context() as patch:
        patch.setattr(ContinuationSampler, "__call__", lambda *args, **kwargs: again.append(1) or original(*args, **kwargs))
        patch.setattr(sample, "tqdm", lambda **settings: bars.append(settings) or RealBar(**{**settings, "disable": True}))
        run(text, tmp_path)
    assert len(again) == 8 - chunks and contents(tmp_path) == contents(whole)
    assert (bars[0]["initial"], bars[0]["total"]) == (16 * chunks, 30 * 4)
    assert "4 samples for each of 30 prefixes; 1 shorter sequences skipped" in capsys.readouterr().out


RealBar = sample.tqdm


def test_killed_and_started_again_it_writes_the_same(text, tmp_path):
    slow = ["--batch-size", 1, "--samples", 50]
    run(text, tmp_path / "whole", *slow, split="train")
    code = "import sys; from fairseq_earm.cli.sample import main; main(sys.argv[1:])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments(text, tmp_path / "killed", *slow, split="train")], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    parts, deadline = tmp_path / "killed" / "train.parts", time.time() + 120
    while not (parts / "part-5").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in parts.glob("part-*[0-9]")}
    assert 5 < len(there) < 153 and not (tmp_path / "killed" / "train.json").exists()
    drawn, add = [], sample.StoreWriter.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample.StoreWriter, "add", lambda self, first, tokens: drawn.append(first) or add(self, first, tokens))
        run(text, tmp_path / "killed", *slow, split="train")
    assert not {f"part-{first}" for first in drawn} & set(there) and len(drawn) + len(there) == 153
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_started_again_when_finished_it_does_nothing(text, whole, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load_base_lm", None)
    run(text, whole)
    assert "valid is finished already: nothing to do" in capsys.readouterr().out


def test_started_again_with_another_checkpoint_it_refuses(text, whole, tmp_path):
    state = torch.load(text.base, map_location="cpu", weights_only=False)
    state["more"] = 1
    torch.save(state, tmp_path / "other.pt")
    assert "the checkpoint given by --path is another one" in refusal(text, whole, "--path", tmp_path / "other.pt")
    assert "--seed 1, this is 2" in refusal(text, whole, "--seed", 2)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prefix-length", LENGTH], "--prefix-length 12 leaves nothing to continue of --sequence-length 12"),
        (["--prefix-length", -1], "--prefix-length -1: give 0 or more"),
        (["--sequence-length", 0], "--sequence-length 0: give 1 or more"),
        (["--sequence-length", 5000], "--sequence-length 5000: .* has 366 tokens and no sequence that long"),
        (["--sequence-length", 13], "--sequence-length 13: --path .* has 12 positions"),
        (["--samples", 0], "--samples 0: give 1 or more"),
        (["--batch-size", 0], "--batch-size 0: give 1 or more"),
        (["--num-shards", 0], "--num-shards 0: give 1 or more"),
        (["--shard-id", -1], "--shard-id -1: give 0 or more"),
        (["--num-shards", 2, "--shard-id", 2], "--shard-id 2: with --num-shards 2 give 0 to 1"),
        (["--num-shards", 9], "--num-shards 9: 30 sequences are 8 batches"),
        (["--seed", -1], "--seed -1: give 0 or more"),
        (["--temperature", 0], "--temperature 0.0: give a number above 0"),
        (["--temperature", "nan"], "--temperature nan: give a number above 0"),
        (["--sampling-topk", 0], "--sampling-topk 0: give 1 or more, or -1"),
        (["--sampling-topk", 500], "--sampling-topk 500: the dictionary has"),
        (["--sampling-topp", 1.5], "--sampling-topp 1.5: give above 0 and at most 1, or -1"),
        (["--sampling-topk", 2, "--sampling-topp", 0.5], "give one of them"),
        (["--gen-subset", "nosplit"], "nosplit: there is no such split"),
        (["--path", "none.pt"], "--path none.pt cannot be read .No such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(text, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message) as error:
        run(text, tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_format_that_fairseq_does_not_have_is_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(text, tmp_path / "out", "--dataset-impl", "mmapped")
    assert "--dataset-impl: invalid choice: 'mmapped'" in capsys.readouterr().err


def test_a_translation_model_is_refused(tiny, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tiny.data / "dict.src.txt", data / "dict.txt")
    for ending in ("bin", "idx"):
        shutil.copy(tiny.data / f"train.src-tgt.src.{ending}", data / f"train.{ending}")
    message = refusal(Namespace(data=data, base=tiny.a), tmp_path / "out", split="train")
    assert "is a TransformerModel: give a language model" in message and not (tmp_path / "out").exists()


def test_a_folder_without_a_dictionary_is_refused(text, tmp_path):
    assert "has no dict.txt" in refusal(Namespace(data=tmp_path, base=text.base), tmp_path / "out")


def test_the_shards_of_a_text_are_refused(text, tmp_path):
    both = f"{text.data}:{text.data}"
    message = refusal(Namespace(data=both, base=text.base), tmp_path / "out")
    assert f"{both} names 2 folders, and this command reads one: give one of them" in message
    assert not (tmp_path / "out").exists()


def test_sentences_that_lose_their_end_are_counted(text, tmp_path, capsys):
    run(text, tmp_path, "--sample-break-mode", "eos", "--prefix-length", 2, "--sequence-length", 6)
    lengths = [len(line.split()) + 1 for line in (text.folder / "valid.txt").read_text().splitlines()]
    shorter, longer = sum(length < 6 for length in lengths), sum(length > 6 for length in lengths)
    printed = capsys.readouterr().out
    assert longer and f"{shorter} shorter sequences skipped; {longer} longer sentences lost their end" in printed


def test_a_checkpoint_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "not a checkpoint" in refusal(text, tmp_path / "out", "--path", tmp_path / "text.pt")


def test_probabilities_that_are_none_are_refused(text, tmp_path):
    state = torch.load(text.base, map_location="cpu", weights_only=False)
    for weight in state["model"].values():
        weight.fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    assert "probabilities are no numbers" in refusal(text, tmp_path / "out", "--path", tmp_path / "nan.pt")
    assert not list((tmp_path / "out").rglob("part-*"))


def test_too_little_memory_names_the_batch(text, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ContinuationSampler, "__call__", full)
    assert "--batch-size 4: 4 times --samples 4 rows do not fit" in refusal(text, tmp_path / "out")


def test_output_beneath_a_file_is_one_line(text, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in refusal(text, tmp_path / "file")


def test_chunks_have_seeds_of_their_own(text, tmp_path, monkeypatch):
    original, used = ContinuationSampler.__call__, []

    def noted(*args, generator, **kwargs):
        used.append(generator.initial_seed())
        return original(*args, generator=generator, **kwargs)

    monkeypatch.setattr(ContinuationSampler, "__call__", noted)
    run(text, tmp_path, "--seed", 5)
    assert used == [sample._seed(5, first) for first in range(0, 30, 4)]
    seeds = {sample._seed(seed, first) for seed in range(30) for first in range(0, 3000, 10)}
    assert len(seeds) == 9000 and all(0 <= seed < 2**64 for seed in seeds)
