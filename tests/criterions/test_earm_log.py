"""Shares of the negatives in the log, over updates, batches of one update, and workers."""
import pytest
from fairseq.logging import metrics

from tests.criterions.stubs import NEGATIVES, FixedSampler, batch, build
from tests.tiny_model import tiny_model


def outputs(model, *rows):
    """What the criterion logs of batches with these negatives."""
    criterion = build(model)
    for each in rows:
        criterion.family.sampler = FixedSampler(model, each)
        yield criterion(model, batch(model))[2]


def test_the_share_of_distinct_negatives_is_of_all_that_were_drawn():
    model = tiny_model().train()
    same = [(NEGATIVES[0][0], source, False) for source in (0, 1, 2)]
    apart = list(outputs(model, NEGATIVES, same))
    assert [int(log["earm_distinct"]) for log in apart] == [6, 1]
    with metrics.aggregate() as one_update:
        type(build(model)).reduce_metrics(apart)
    assert one_update.get_smoothed_values()["earm_distinct"] == pytest.approx(7 / 9, abs=1e-4)
    with metrics.aggregate() as two_updates:
        for log in apart:
            type(build(model)).reduce_metrics([log])
    assert two_updates.get_smoothed_values()["earm_distinct"] == pytest.approx(7 / 9, abs=1e-4)


def test_without_negatives_there_is_no_share():
    model = tiny_model().train()
    with metrics.aggregate() as logged:
        criterion = build(model, earm_control=True)
        criterion.reduce_metrics([criterion(model, batch(model))[2]])
    assert "earm_distinct" not in logged.get_smoothed_values()
