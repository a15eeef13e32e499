"""The runner of long experiments, with commands that write down their order."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from steps import Step, done, run_steps, spread  # noqa: E402


def step(folder, name, needs=(), script="pass"):
    note = f"open({str(folder / 'order')!r}, 'a').write({name!r} + ' ')"
    return Step(name, [sys.executable, "-c", f"{note}; {script}"], tuple(needs))


def test_steps_run_after_what_they_need_and_once(tmp_path):
    steps = [step(tmp_path, "a", script="import time; time.sleep(0.3)"), step(tmp_path, "b"), step(tmp_path, "c", ["a"])]
    run_steps(steps, tmp_path / "logs", jobs=2)
    order = (tmp_path / "order").read_text().split()
    assert sorted(order) == ["a", "b", "c"] and order.index("a") < order.index("c")
    (tmp_path / "logs" / "c.log").write_text("cut off")
    run_steps(steps, tmp_path / "logs", jobs=2)
    assert (tmp_path / "order").read_text().split() == [*order, "c"]


def test_a_step_that_waits_keeps_nobody_from_work(tmp_path):
    """With two at a time, b ends while a runs, and its place goes to c and d, not to what needs a."""
    ended = f"import time; [time.sleep(0.05) for _ in range(900) if 'd' not in open({str(tmp_path / 'order')!r}).read()]"
    steps = [step(tmp_path, "a", script=ended), step(tmp_path, "a2", ["a"]), step(tmp_path, "b"), step(tmp_path, "c"), step(tmp_path, "d")]
    run_steps(steps, tmp_path / "logs", jobs=2)
    order = (tmp_path / "order").read_text().split()
    assert order[-1] == "a2" and [name for name in order if name in "bcd"] == ["b", "c", "d"]


def test_earlier_steps_go_first_where_their_needs_are_met(tmp_path):
    steps = [step(tmp_path, "x/train"), step(tmp_path, "x/test", ["x/train"]), step(tmp_path, "y/train"), step(tmp_path, "y/test", ["y/train"])]
    run_steps(steps, tmp_path / "logs", jobs=1)
    assert (tmp_path / "order").read_text().split() == [each.name for each in steps]
    assert done(tmp_path / "logs" / "x" / "test.log")


def test_a_need_that_is_no_step_is_named(tmp_path):
    with pytest.raises(ValueError, match="b needs c: there are no such steps"):
        run_steps([step(tmp_path, "a"), step(tmp_path, "b", ["c"])], tmp_path / "logs", jobs=1)


def test_a_failure_stops_what_needs_it_and_nothing_else(tmp_path):
    steps = [step(tmp_path, "a", script="exit(3)"), step(tmp_path, "b", ["a"]), step(tmp_path, "c")]
    with pytest.raises(SystemExit, match="failed with status 3; see .*a.log"):
        run_steps(steps, tmp_path / "logs", jobs=1)
    assert (tmp_path / "order").read_text().split() == ["a", "c"]
    assert [done(tmp_path / "logs" / f"{name}.log") for name in "abc"] == [False, False, True]


def test_spread():
    assert [spread(values, 2) for values in ([], [1.0], [1.0, 2.0])] == ["", "1.00", "1.50 ± 0.71"]
