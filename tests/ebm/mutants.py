"""The loss as it would be with one line of the package changed: no such change may go unnoticed."""

from __future__ import annotations

import inspect
import sys
import types

from fairseq_earm.ebm import baseline, contrast, earm, objectives, weights

MODULES = (weights, baseline, contrast, objectives, earm)


def mutated_loss(module, line: str, replacement: str):
    """`earm_loss` as it would be with one line of one of `MODULES` changed."""
    return mutated(module, line, replacement)["earm"].earm_loss


def mutated(module, line: str, replacement: str) -> dict:
    """Copies of `MODULES` by their names, one line of one of them changed; the copies import each other."""
    copies, own = {}, {}
    for original in MODULES:
        source = inspect.getsource(original)
        if original is module:
            assert source.count(line) == 1, f"the line to change is not there once: {line}"
            source = source.replace(line, replacement)
        name = original.__name__.split(".")[-1]
        copies[name] = copy = types.ModuleType("copy_of_" + name)
        copy.__dict__["__annotations__"] = {}
        sys.modules[copy.__name__] = copy  # where a dataclass looks for its annotations
        exec(compile(source, copy.__name__, "exec"), copy.__dict__)
        for known in [key for key in copy.__dict__ if key in own]:
            setattr(copy, known, own[known])
        own.update(
            {key: value for key, value in vars(copy).items() if getattr(value, "__module__", "") == copy.__name__}
        )
    return copies
