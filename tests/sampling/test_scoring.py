"""Scores of given sequences at the end of what a model has positions for."""
import pytest
import torch

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.scoring import score_sequences
from tests.tiny_model import tiny_batch, tiny_model

EOS = 2


def score(model, length, step):
    tokens = torch.tensor([[4] * (length - 1) + [EOS], [EOS] + [1] * (length - 1)])
    return score_sequences(model, tiny_batch(model), tokens, tokens.ne(1), energy_step=step).log_mu


def test_the_step_after_the_last_position_is_refused():
    model = tiny_model(max_target_positions=4, learned_positions=True)
    assert score(model, 4, "last").isfinite().all() and score(model, 3, "post").isfinite().all()
    with pytest.raises(UsageError, match="--energy-step post: .* all 4 positions of the model; .*use last") as error:
        score(model, 4, "post")
    assert "\n" not in str(error.value)


def test_computed_positions_go_on():
    assert score(tiny_model(max_target_positions=4), 4, "post").isfinite().all()
