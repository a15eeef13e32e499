"""A joint model P_LM · exp(−E) whose every sequence is listed, as plain sums in float64."""
from __future__ import annotations

import math
from typing import Dict, Tuple

Sequence = Tuple[int, ...]


class ListedJoint:
    """All continuations of one prefix, with their log-probability under the base and their energy.

    Args:
        log_probs: continuation → log P_LM.
        energies: continuation → E.
    """

    def __init__(self, log_probs: Dict[Sequence, float], energies: Dict[Sequence, float]):
        self.log_probs = log_probs
        self.energies = energies

    def log_mass(self, start: Sequence, *, energy: bool = True) -> float:
        """log Σ P_LM(x) exp(−E(x)), or without the energies log Σ P_LM(x), over the continuations that begin so."""
        mass = (
            math.exp(log_prob - (self.energies[x] if energy else 0.0))
            for x, log_prob in self.log_probs.items()
            if x[: len(start)] == start
        )
        return math.log(math.fsum(mass))

    def log_z(self) -> float:
        return self.log_mass(())

    def log_completion(self, start: Sequence) -> float:
        """log E[exp(−E)] over what the base makes of these first tokens."""
        return self.log_mass(start) - self.log_mass(start, energy=False)

    def log_prob(self, x: Sequence) -> float:
        """log P(x) under the joint model."""
        return self.log_probs[x] - self.energies[x] - self.log_z()

    def step_log_prob(self, x: Sequence, step: int) -> float:
        """log P(x_step | x_<step) under the joint model, steps from 1."""
        return self.log_mass(x[:step]) - self.log_mass(x[: step - 1])
