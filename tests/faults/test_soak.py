"""What the soak calls a leak, on made-up measurements, and that it measures what a process holds."""
import json
import os
import random
import subprocess

import pytest

from tests.faults import soak


def judged(folder, leak=0.0, files=0, busier=0.0, grows=("rss", "peak", "private")):
    """The verdict on two hours in which memory goes up and down, and what `grows` grows by so many percent an hour.

    Args:
        busier: by how much the share of samples with a large batch under way rises.
    """
    rng = random.Random(1)
    lines = []
    for minute in range(0, 121):
        held = 2**20 * (700 - rng.uniform(0, 5)) * (0.5 if minute < 5 else 1)
        large = 2**27 * (rng.random() < 0.2 + busier * minute / 120)
        memory = {"rss": held + large, "peak": held + 2**27 + 2**20 * rng.expovariate(1 / 5), "private": held + large}
        memory = {name: value * (1 + (name in grows) * leak / 100 * minute / 60) for name, value in memory.items()}
        held = {**memory, "files": 60 + files * (minute // 60) + 90 * (minute == 119), "threads": 9, "processes": 2, "updates": minute}
        lines.append(json.dumps({"seconds": 60 * minute, **held}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + '\n{"seconds": 12')
    return soak.report(soak.parser().parse_args(["report", str(folder)]))


def test_what_is_flat_is_sound_and_what_grows_is_not(tmp_path, capsys):
    assert judged(tmp_path)
    assert "120 minutes, 120 updates, 121 samples" in capsys.readouterr().out
    assert judged(tmp_path, leak=0.5)
    capsys.readouterr()
    assert not judged(tmp_path, leak=2)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in printed if "LEAKS (limit 2%)" in line] == ["rss", "peak", "private"]
    for name in ("rss", "peak", "private"):
        assert not judged(tmp_path, leak=2, grows=[name])
        assert sum("LEAKS" in line for line in capsys.readouterr().out.splitlines()) == 1
    assert not judged(tmp_path, files=1)
    assert "files" in next(line for line in capsys.readouterr().out.splitlines() if "LEAKS" in line)


def test_a_machine_that_others_make_slower_is_no_leak(tmp_path):
    assert judged(tmp_path, busier=0.7)


def test_minutes_that_the_machine_stood_still_do_not_count():
    samples = [{"seconds": second} for second in (10, 20, 31, 40, 500, 510)]
    assert soak.running_minutes(samples) * 60 == pytest.approx([10, 20, 31, 40, 70, 80])


def test_nothing_measured_yet(tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(SystemExit, match="nothing measured after minute 10 yet"):
        soak.report(soak.parser().parse_args(["report", str(tmp_path)]))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="only Linux has it")
def test_a_sample_sees_memory_files_children_and_progress(tmp_path):
    log = tmp_path / "train.log"
    log.write_text('x {"loss": "3", "num_updates": "12", "lr": "1"}\nx {"loss": "3", "num_updates": "14", "lr": "1"}\n')
    before = soak.sample(os.getpid(), log)
    bytearray(os.urandom(2**26))
    held = bytearray(os.urandom(2**25))
    child = subprocess.Popen(["sleep", "600"])
    with log.open():
        after = soak.sample(os.getpid(), log)
    child.kill()
    child.wait()
    assert len(held) == 2**25 and after["rss"] - before["rss"] > 2**24 and after["private"] - before["private"] > 2**24
    assert after["peak"] - after["rss"] > 2**24
    assert soak.sample(os.getpid(), log)["peak"] < after["peak"]
    assert after["processes"] == before["processes"] + 1 and after["files"] > before["files"] and after["updates"] == 14
