"""Curves of training: their numbers, and that figures are drawn and fit into pages."""
import json
import math
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from fairseq_earm.evaluation import curves  # noqa: E402
from tests.evaluation.test_plots import is_drawn  # noqa: E402


def record(kind, **values):
    return f"INFO | {kind} | {json.dumps(values)}\n"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("".join(record("train_inner", epoch=1, loss=4 - n, num_updates=n, earm_dv=n / 9) for n in (1, 2)))
    return path


def test_training_curves(log, tmp_path):
    target = tmp_path / "curves.png"
    curves.training_curves({"one": [log], "_$two": [log, log]}, [("train_inner", k, k) for k in ("loss", "earm_dv")], target, "title")
    assert is_drawn(target)


def history(epochs, start=None):
    """Two intervals and two validations an epoch; E-ARM from epoch `start` on."""
    earm = [{} if start is None or n < start else {"earm_loss": 1.0} for n in range(1, epochs + 1)]
    half = [(n, 10 * n - 5 * first) for n in range(1, epochs + 1) for first in (1, 0)]
    return {
        "train_inner": [{"epoch": n, "num_updates": u, "nll_loss": 100 - u, **earm[n - 1]} for n, u in half],
        "train": [{"epoch": n, "num_updates": 10 * n, "nll_loss": 50 - n, **earm[n - 1]} for n in range(1, epochs + 1)],
        "valid": [{"epoch": n, "num_updates": u, "loss": 7.0, "nll_loss": 60 - u} for n, u in half],
    }


def test_convergence_takes_the_last_record_of_an_epoch():
    found = curves.convergence_of(history(3, start=2))
    assert found == ("nll_loss", {"train": ([1, 2, 3], [49, 48, 47]), "valid": ([1, 2, 3], [50, 40, 30])}, 2)
    by_update = curves.convergence_of(history(2, start=2), "update")
    assert by_update.curves["train"] == ([5, 10, 15, 20], [95, 90, 85, 80])
    assert by_update.curves["valid"] == ([5, 10, 15, 20], [55, 50, 45, 40]) and by_update.earm == 15


@pytest.mark.parametrize("start", [None, 1])
def test_no_entry_is_marked_for_runs_without_earm_or_with_it_from_the_first_record(start):
    assert curves.convergence_of(history(2, start)).earm is None


def test_loss_stands_in_for_cross_entropy_only_where_that_is_all_there_is():
    logged = {"train": [{"epoch": 1, "num_updates": 3, "loss": 2.0}], "valid": []}
    assert curves.convergence_of(logged) == ("loss", {"train": ([1], [2.0])}, None)
    logged["valid"].append({"epoch": 1, "nll_loss": 1.0})
    assert curves.convergence_of(logged).curves == {"valid": ([1], [1.0])}


def test_convergence_is_drawn(tmp_path):
    target = tmp_path / "figure.png"
    runs = {"a $b": [curves.convergence_of(history(n)) for n in (2, 3)], "_b": [curves.convergence_of(history(2, start=2))]}
    curves.convergence(runs, "epoch", target, "title")
    assert is_drawn(target)


def test_seeds_are_averaged_where_all_have_a_value():
    assert curves._mean([([1, 2, 3], [1, 2, 3]), ([2, 3, 4], [4, 6, 9])]) == ([2, 3], [3, 4.5])


def test_a_panel_is_svg_that_takes_the_colours_of_its_page():
    lines = [curves.Curve(([1, 2, 3, 4], [1.0, math.nan, math.inf, 3.0]), "#2f7fd1", "o--")]
    svg = curves.panel(lines, "<DV> & more", zero=True, entries=[(2, "#d9640b")]).decode()
    tree = ElementTree.fromstring(svg[svg.index("<svg"):])
    assert "<DV> & more" in "".join(tree.itertext())
    assert "currentColor" in svg and "#2f7fd1" in svg and "#d9640b" in svg and curves.INK not in svg
    assert "<metadata" not in svg and 'id="axes' not in svg


def test_thinning_keeps_means():
    assert curves.thinned([1, 2, 3], [4, 5, 6], most=3) == ([1, 2, 3], [4, 5, 6])
    assert curves.thinned([1, 2, 3, 4, 5], [1, 3, 5, 7, 9], most=3) == ([1.5, 3.5, 5], [2, 6, 9])
    assert curves.thinned([], []) == ([], [])


HUGE = [1.0, 1e308, -1e308, 1e200, 2.0, 5e-324]


def test_numbers_beyond_any_axis_are_left_out(tmp_path):
    points = (list(range(len(HUGE))), HUGE)
    assert curves.drawable(points) == ([0, 4, 5], [1.0, 2.0, 5e-324])
    lines = [curves.Curve(points, "#2f7fd1")]
    assert curves.panel(lines, "loss", log=True, limits=curves.settled_range(lines)).startswith(b"<?xml")
    logged = {"train": [{"epoch": n, "loss": loss} for n, loss in zip(*points)]}
    seeds = [curves.convergence_of(logged)] * 2
    only_huge = curves.convergence_of({"train": logged["train"][1:3]})
    curves.convergence({"a": seeds, "b": [only_huge]}, "epoch", tmp_path / "a.png")
    assert is_drawn(tmp_path / "a.png")


def test_updates_of_tensorboard_may_be_below_zero():
    assert curves.settled_range([curves.Curve(([-9.0, -3.0], [9.0, 1.0]), "#2f7fd1")]) is None
