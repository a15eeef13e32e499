"""The support matrix: what is refused, what is remarked on, and what passes in silence."""
import pytest

from fairseq_earm import compat_versions

GOOD_FORK = {"fairseq-fixed": "0.12.3.1", "fairseq": None, "torch": "2.13.0+cpu", "numpy": "2.4.6", "omegaconf": "2.3.0"}
GOOD_STOCK = {"fairseq-fixed": None, "fairseq": "0.12.2", "torch": "1.13.1", "numpy": "1.23.5", "omegaconf": "2.0.6"}


def test_the_two_rows_are_accepted_without_a_word():
    for python in ((3, 11), (3, 12)):
        assert compat_versions.unsupported(python, GOOD_FORK) is None
    for python in ((3, 9), (3, 10)):
        assert compat_versions.unsupported(python, GOOD_STOCK) is None
    assert compat_versions.untested(GOOD_FORK) is None
    assert compat_versions.untested(GOOD_STOCK) is None


@pytest.mark.parametrize(
    "python, row, change, says",
    [
        ((3, 8), GOOD_STOCK, {}, "Python 3.8 is not supported; use Python 3.9 to 3.12"),
        ((3, 13), GOOD_FORK, {}, "Python 3.13 is not supported"),
        ((3, 11), GOOD_FORK, {"fairseq": "0.12.2"}, "pip uninstall -y fairseq-fixed fairseq, then install fairseq-fixed=="),
        ((3, 10), GOOD_FORK, {"fairseq-fixed": None}, "fairseq is not installed; `make setup` installs fairseq==0.12.2"),
        ((3, 12), GOOD_FORK, {"fairseq-fixed": None}, "fairseq is not installed; `make setup` installs fairseq-fixed==0.12.3.1"),
        ((3, 11), GOOD_STOCK, {}, "stock fairseq 0.12.2 does not run on Python 3.11; install fairseq-fixed==0.12.3.1"),
        ((3, 10), GOOD_FORK, {}, "needs Python 3.11 or 3.12, this is 3.10; install fairseq==0.12.2"),
        ((3, 10), GOOD_STOCK, {"torch": None}, "torch is not installed"),
        ((3, 10), GOOD_STOCK, {"torch": "1.9.1"}, "torch 1.9.1 is too old; install torch 1.13.1"),
        ((3, 10), GOOD_STOCK, {"numpy": "1.26.4"}, "does not run with numpy 1.26.4; pip install 'numpy<1.24'"),
    ],
)
def test_what_cannot_work_is_named_with_its_remedy(python, row, change, says):
    problem = compat_versions.unsupported(python, {**row, **change})
    assert says in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    "row, change, says",
    [
        (GOOD_FORK, {"torch": "2.12.1"}, "torch 2.12.1 (tested with fairseq-fixed: 2.13 to 2.13)"),
        (GOOD_FORK, {"numpy": "1.26.4"}, "numpy 1.26.4"),
        (GOOD_FORK, {"fairseq-fixed": "0.12.4"}, "fairseq-fixed 0.12.4 (tested: 0.12.3.1)"),
        (GOOD_STOCK, {"torch": "2.6.0", "omegaconf": "2.4.0"}, "omegaconf 2.4.0"),
        (GOOD_STOCK, {"fairseq": "1.0.0a0"}, "fairseq 1.0.0a0"),
    ],
)
def test_what_was_not_tested_is_remarked_on(row, change, says):
    assert says in compat_versions.untested({**row, **change})


def test_an_impossible_combination_stops_the_import_with_one_line(monkeypatch):
    monkeypatch.setattr(compat_versions, "_installed", {**GOOD_FORK, "torch": "1.4.0", "fairseq": "0.12.2"}.get)
    with pytest.raises(ImportError) as stopped:
        compat_versions.check_versions()
    assert str(stopped.value).startswith("fairseq-earm: ")
    assert "\n" not in str(stopped.value)


def test_an_untested_combination_warns_once_in_one_line(monkeypatch, warnings):
    found = {name: compat_versions._installed(name) for name in GOOD_FORK}
    monkeypatch.setattr(compat_versions, "_installed", {**found, "torch": "2.99.0"}.get)
    compat_versions.check_versions()
    compat_versions.check_versions()
    [line] = warnings()
    assert "torch 2.99.0" in line and "\n" not in line


def test_fairseq_from_a_source_folder_is_found(monkeypatch, warnings):
    found = {name: compat_versions._installed(name) for name in GOOD_FORK}
    monkeypatch.setattr(compat_versions, "_installed", {**found, "fairseq": None, "fairseq-fixed": None}.get)
    compat_versions.check_versions()
    assert "from a source folder" in warnings()[0]
