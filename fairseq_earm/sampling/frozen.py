"""A trained model used as it is: the base of a residual energy."""
from __future__ import annotations

import hashlib
import os
from typing import Optional

import torch
from fairseq import checkpoint_utils, utils

from fairseq_earm.compat import computes_half_on_cpu
from fairseq_earm.errors import UsageError, reason


class FrozenModel:
    """A model in eval mode whose parameters never change.

    Not a module: whoever keeps it as an attribute takes it neither into a checkpoint, nor to an optimizer, nor into DDP.
    Call it under `torch.no_grad()`.

    Attributes:
        model: the fairseq model, not wrapped.
        task: the task it was trained with.
    """

    def __init__(self, model, task):
        self.model = model.eval().requires_grad_(False)
        self.task = task

    def to(self, device) -> "FrozenModel":
        """Move the model, in place, and return self.

        Raises:
            UsageError: a model in float16 goes to the CPU, where this torch does not compute it.
        """
        half = next(self.model.parameters()).dtype == torch.float16
        if half and torch.device(device).type == "cpu" and not computes_half_on_cpu():
            raise UsageError(
                f"--dtype, --base-dtype or --fp16: torch {torch.__version__} computes float16 on GPUs alone; use a GPU, float32 or "
                "bfloat16"
            )
        self.model.to(device)
        return self


def load_frozen(path: str, task, *, flag: str, dtype: Optional[torch.dtype] = None) -> FrozenModel:
    """Load the model of a checkpoint, to be used with the data of another task. No random numbers are used up.

    Args:
        path: a checkpoint of fairseq-train.
        task: the task whose data the model will read; the dictionaries must be the same.
        flag: the flag that gave the path, for messages.
        dtype: floating-point type of the model's parameters; by default the checkpoint's.
    Raises:
        UsageError: no such file, not a model, or dictionaries that differ; names the first difference.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{flag} {path}: there is no such file; give a checkpoint of fairseq-train")
    try:
        with torch.random.fork_rng(devices=[]):  # its parameters are drawn at first
            models, _, own_task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=_data(path, task))
    except Exception as error:  # fairseq raises whatever it likes at files that are no checkpoints
        raise UsageError(f"{flag} {path}: not a checkpoint that can be used with this data ({reason(error)})") from error
    _check_dictionaries(path, flag, own_task, task)
    model = models[0] if dtype is None else models[0].to(dtype)
    return FrozenModel(model, own_task)


def file_hash(path: str, *, flag: str) -> str:
    """SHA-256 of a checkpoint's file.

    Raises:
        UsageError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(1 << 24), b""):
                digest.update(piece)
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read ({error.strerror}): give a checkpoint of fairseq-train") from None
    return digest.hexdigest()


def _data(path: str, task) -> dict:
    """The checkpoint's own data folder where it still has a dictionary to compare; else the task's."""
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    cfg = state["cfg"]["task"] if state.get("cfg") is not None else state.get("args")
    own = utils.split_paths(str(getattr(cfg, "data", "") or ""))[0]
    if os.path.isdir(own) and any(name.startswith("dict.") for name in os.listdir(own)):
        return {}
    settings = getattr(task, "cfg", None) or task.args
    return {"data": settings.data}


def _check_dictionaries(path: str, flag: str, own_task, task) -> None:
    sides = {"source": (own_task.source_dictionary, task.source_dictionary)}
    if task.target_dictionary is not task.source_dictionary:
        sides["target"] = (own_task.target_dictionary, task.target_dictionary)
    for side, (own, given) in sides.items():
        if not (hasattr(own, "symbols") and hasattr(given, "symbols")):
            raise UsageError(f"{flag} {path}: {type(own_task).__name__} has no dictionary of words; give a model of text")
        difference = first_difference(own, given)
        if difference:
            raise UsageError(
                f"{flag} {path}: its {side} dictionary is not the data's: {difference}; preprocess the data with its dictionary"
            )


def first_difference(own, given) -> str:
    """What tells two dictionaries apart, own first; empty where they agree in every symbol and its index."""
    for index, (here, there) in enumerate(zip(own.symbols, given.symbols)):
        if here != there:
            return f"index {index} is {here!r} there and {there!r} here"
    if len(own) != len(given):
        return f"{len(own)} symbols there and {len(given)} here"
    return ""
