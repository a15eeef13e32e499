"""Optimizer states between stock fairseq and its last main.

Stock fairseq keeps a second copy of each encoder layer's weights, as parameters that are never trained, and an optimizer
numbers all parameters through: without renumbering, the state of a run under one fairseq does not fit under the other.
"""
from __future__ import annotations

from fairseq_earm.errors import UsageError

COPIES = tuple(f"{part}_{kind}" for part in ("in_proj", "out_proj", "fc1", "fc2") for kind in ("weight", "bias"))


def fitting_state(state: dict, optimizer, model, layer: type, has_copies: bool) -> dict:
    """An optimizer's saved state, its parameters numbered as this fairseq does; what fits already as it is.

    Args:
        state: of torch's kind, "state" and "param_groups".
        optimizer: the one that is to load it.
        model: whose parameters it trains.
        layer: class of fairseq's encoder layers.
        has_copies: whether this fairseq's encoder layers hold the copies.
    Raises:
        UsageError: half precision has laid the parameters end to end, and the copies among them.
    """
    if len(state["param_groups"]) != 1 or len(optimizer.param_groups) != 1:
        return state
    ours, theirs = (len(found[0]["params"]) for found in (optimizer.param_groups, state["param_groups"]))
    copies = _copies(model, layer, has_copies)
    originals = [number for number, copy in enumerate(copies) if not copy]
    if has_copies and (ours, theirs) == (len(copies), len(originals)):
        return _renumbered(state, dict(enumerate(originals)), ours)
    if not has_copies and (ours, theirs) == (len(originals), len(copies)):
        return _renumbered(state, {number: place for place, number in enumerate(originals)}, ours)
    if ours == theirs == 1 and any(copies):
        _check_size(state, optimizer)
    return state


def _copies(model, layer: type, has_copies: bool) -> list:
    """Of each trained parameter, numbered as stock fairseq does, whether it is such a copy."""
    found, seen = [], set()
    for module in model.modules():
        if isinstance(module, layer) and not has_copies:
            found += [True] * len(COPIES)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                found.append(isinstance(module, layer) and name in COPIES)
    return found


def _renumbered(state: dict, numbers: dict, count: int) -> dict:
    """The state of `count` parameters, number i of before being `numbers[i]` now, or gone."""
    [group] = state["param_groups"]
    moments = {numbers[before]: kept for before, kept in state["state"].items() if before in numbers}
    return {**state, "state": moments, "param_groups": [{**group, "params": list(range(count))}]}


def _check_size(state: dict, optimizer) -> None:
    [parameter] = optimizer.param_groups[0]["params"]
    moments = [value for kept in state["state"].values() for value in kept.values() if hasattr(value, "dim") and value.dim() == 1]
    if any(value.numel() not in (1, parameter.numel()) for value in moments):
        raise UsageError(
            "this checkpoint's optimizer state is of another fairseq (stock 0.12.2 counts its copies of encoder weights in), which "
            "--fp16 and --bf16 lay end to end: give --reset-optimizer, or go on under the fairseq that wrote it"
        )
