"""Killed with SIGKILL at random moments and started again, every command ends as if it had never been killed.

FAIRSEQ_EARM_KILLS says how often each is killed (`make kill-tests`: 20 times).
"""
from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch

from tests.faults import slow_disk
from tests.faults.killing import Command, Runner, kill_often, leftovers
from tests.tiny_translation import PLUGIN, WORDS, same_state, train_arguments

KILLS = int(os.environ.get("FAIRSEQ_EARM_KILLS", 3))
UPDATES = 8
EARM = "--criterion earm_cross_entropy --label-smoothing 0.1 --earm-start-update 0 --earm-normalizer-ema 0.9".split()
# Five updates an epoch: moments before, within and at the end of one. Each checkpoint is written, copied twice and later removed.
OFTEN = ["--save-interval-updates", 1, "--batch-size", 96, "--max-update", UPDATES, "--user-dir", PLUGIN]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with Runner(tmp_path_factory.mktemp("runner")) as started:
        yield started


@pytest.fixture
def killed(runner, tmp_path, capfd):
    """Kill a command so often, having run it once undisturbed by `reference`; prints what was met."""

    def kill(command, reference):
        duration = runner.run(command, reference)
        command.same(reference, runner.printed())
        folder = tmp_path / "killed"
        folder.mkdir()
        met = kill_often(runner, command, folder, duration, KILLS)
        with capfd.disabled():
            print(f"\n{met.line(command.name)}; one undisturbed run takes {duration:.1f} s")
        assert met.found[slow_disk.WRITING] > 0

    return kill


def checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=False)


def updates(state):
    return state["optimizer_history"][-1]["num_updates"]


def running_state(state):
    """E-ARM's moving normaliser and its clock, as saved."""
    meters = {name: meter["val"] for _, name, _, meter in state["extra_state"]["metrics"]["earm_state"]}
    return {name: torch.as_tensor(value).tolist() for name, value in meters.items()}


def test_training(tiny, tmp_path, killed):
    reference = tmp_path / "reference"

    def words(folder):
        keep = [] if folder == reference else ["--keep-interval-updates", 2]
        flags = train_arguments(tiny, folder, *EARM, *OFTEN, *keep, "--task", "earm_translation", validate=True)
        return [flag for flag in flags if flag != "--no-epoch-checkpoints"]  # the reference keeps every update

    def never_killed():
        return {updates(state): state for state in map(checkpoint, reference.glob("checkpoint*.pt"))}

    def check(folder):
        """Every checkpoint can be read and is that of its update."""
        expected = never_killed()
        for path in folder.glob("checkpoint*.pt"):
            state = checkpoint(path)
            assert same_state(state, expected[updates(state)]), path

    def same(folder, _):
        check(folder)
        last, expected = checkpoint(folder / "checkpoint_last.pt"), never_killed()[UPDATES]
        assert updates(last) == UPDATES and same_state(last, expected)
        assert running_state(last) == running_state(expected)
        assert last["extra_state"]["best"] == expected["extra_state"]["best"]
        assert last["extra_state"]["train_iterator"] == expected["extra_state"]["train_iterator"]
        assert leftovers(folder) == []

    killed(Command("fairseq-train", "fairseq_cli.train", words, 0.0001, check, same), reference)


def test_sampling(text, tmp_path, killed):
    def words(folder):
        where = [text.data, "--path", text.base, "--output", folder, "--gen-subset", "train", "--cpu"]
        return [*where, "--prefix-length", 8, "--sequence-length", 12, "--samples", 20, "--batch-size", 4]

    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def check(folder):
        parts = folder / "train.parts"
        sizes = {path.stat().st_size for path in parts.glob("part-*") if re.fullmatch(r"part-\d+", path.name)}
        assert len(sizes) <= 2  # the last one may be shorter
        if (folder / "train.json").exists():
            assert contents(folder) == contents(tmp_path / "reference")

    def same(folder, _):
        assert contents(folder) == contents(tmp_path / "reference") and leftovers(folder) == []

    killed(Command("fairseq-earm-sample", "fairseq_earm.cli.sample", words, 0.003, check, same), tmp_path / "reference")


def results(folder: Path):
    """The whole JSON of a command's results, None if there is none."""
    path = folder / "out.json"
    return json.loads(path.read_text()) if path.exists() else None


def compared(reference: Path):
    """`check` and `same` of a command with --json out.json that prints a table; what it printed first is what it must print."""
    printed = set()

    def check(folder):
        assert results(folder) in (None, results(reference))

    def same(folder, out):
        printed.add("\n".join(line for line in out.splitlines() if " | " not in line))  # without the log
        assert results(folder) == results(reference) is not None and len(printed) == 1 and leftovers(folder) == []

    return check, same


def test_perplexity(text, tmp_path, killed):
    reference = tmp_path / "reference"
    reference.mkdir()

    def words(folder):
        model = [text.data, "--path", text.base, "--energy", "earm", "--cpu", "--sequence-length", 12]
        return [*model, "--samples", 100, "--prefix-length", 6, "--per-step", "--json", folder / "out.json"]

    killed(Command("fairseq-earm-perplexity", "fairseq_earm.cli.perplexity", words, 0.02, *compared(reference)), reference)


def write_nbest(path: Path, sentences: int = 80, beam: int = 4) -> None:
    """As fairseq-generate --energy-rerank --nbest prints it."""
    rng = random.Random(1)
    with path.open("w") as file:
        for number in range(sentences):
            target = rng.choices(WORDS, k=rng.randint(4, 9))
            file.write(f"S-{number}\tx\nT-{number}\t{' '.join(target)}\n")
            for _ in range(beam):
                words = [word if rng.random() < 0.8 else rng.choice(WORDS) for word in target]
                scores = " ".join(f"{-rng.random():.4f}" for _ in range(len(words) + 1))
                score, line = f"{-rng.random():.4f}", " ".join(words)
                file.write(f"H-{number}\t{score}\t{line}\nD-{number}\t{score}\t{line}\nP-{number}\t{scores}\n")


def test_tuning(tmp_path, killed):
    reference = tmp_path / "reference"
    reference.mkdir()
    write_nbest(tmp_path / "nbest.txt")

    def words(folder):
        generated = ["--generated-energy-weight", 1, "--generated-lenpen", 1]
        return [tmp_path / "nbest.txt", *generated, "--resamples", 50, "--json", folder / "out.json"]

    killed(Command("fairseq-earm-tune", "fairseq_earm.cli.tune", words, 0.03, *compared(reference)), reference)
