"""A trained energy network, loaded to be used as it is."""
from __future__ import annotations

import logging
import os
from typing import Optional

import torch

from fairseq_earm.errors import UsageError, one_line
from fairseq_earm.models.energy_transformer import EnergyModel
from fairseq_earm.sampling.frozen import FrozenModel, file_hash, load_frozen

logger = logging.getLogger(__name__)


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


def report_other_base(energy: FrozenModel, energy_path: str, base_path: str) -> None:
    """Warn where an energy is used on another base than it was trained on: it is no residual of that, though it may be wanted.

    Nothing is said where the energy's own base is not known, or not there any more.

    Args:
        energy: as `load_energy` gave it.
        energy_path, base_path: checkpoints, for the message; the second is read.
    Raises:
        UsageError: one of the two bases is there and cannot be read.
    """
    settings = energy.task.cfg
    own = getattr(settings, "base_lm", None) or getattr(settings, "base_model", None)
    if not own or not os.path.isfile(own) or os.path.realpath(own) == os.path.realpath(base_path):
        return
    if file_hash(own, flag=f"--energy-path {energy_path}: its base") != file_hash(base_path, flag="--path"):
        message = "--path %s is not the base that --energy-path %s was trained on, %s"
        logger.warning(message, base_path, energy_path, one_line(str(own)))
