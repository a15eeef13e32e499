"""A trained energy network, loaded to be used as it is."""
from __future__ import annotations

from typing import Optional

import torch

from fairseq_earm.errors import UsageError
from fairseq_earm.models.energy_transformer import EnergyModel
from fairseq_earm.sampling.frozen import FrozenModel, load_frozen


def load_energy(path: str, task, *, flag: str = "--energy-path", dtype: Optional[torch.dtype] = None) -> FrozenModel:
    """`load_frozen` for an energy network; its own task's settings say which lengths it was trained on.

    Raises:
        UsageError: as `load_frozen`; also another kind of model.
    """
    frozen = load_frozen(path, task, flag=flag, dtype=dtype)
    if not isinstance(frozen.model, EnergyModel):
        raise UsageError(
            f"{flag} {path} is a {type(frozen.model).__name__}: give an energy network (fairseq-train --criterion residual_nce)"
        )
    return frozen
