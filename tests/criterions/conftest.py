"""Each test begins without the metrics of another."""
import pytest
from fairseq.logging import metrics


@pytest.fixture(autouse=True)
def no_metrics():
    metrics.reset()
    yield
    metrics.reset()
