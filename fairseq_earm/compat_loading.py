"""Reading a checkpoint runs nothing that stands in it: what it may hold beside tensors, what fairseq may evaluate of its settings.

The part of `compat` that guards what comes from elsewhere.
"""
from __future__ import annotations

import argparse
import ast
import importlib
import operator
import re
import sys
from pickle import UnpicklingError
from typing import List

import numpy as np

from fairseq_earm.compat import _wrap
from fairseq_earm.compat_versions import parse
from fairseq_earm.errors import UsageError

LARGEST = 1 << 20  # elements of a list that a setting multiplies out
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
SIGNS = {ast.USub: operator.neg, ast.UAdd: operator.pos}
NOTHING = bytes(8)  # what an array without a state yet points at, never freed


def load_without_running() -> None:
    """See above. torch < 2.6 runs what a pickle tells it to; there only the settings are guarded."""
    import torch

    if checks_what_it_loads():
        torch.serialization.add_safe_globals(checkpoint_types())
        say_what_is_refused()
    evaluate_settings_only()


def checks_what_it_loads() -> bool:
    """Whether torch.load refuses what is neither tensors nor plain containers nor allowed: torch ≥ 2.6."""
    import torch

    return parse(torch.__version__) >= (2, 6)


def say_what_is_refused() -> None:
    """What torch says of a checkpoint that it does not load is a page long, and advises to load it all the same."""
    from fairseq import checkpoint_utils

    def replace(original):
        def load_checkpoint_to_cpu(path, *args, **kwargs):
            try:
                return original(path, *args, **kwargs)
            except UnpicklingError as error:
                raise RefusedCode(f"{path} is not read as a checkpoint: {refused(error)}") from error

        return load_checkpoint_to_cpu

    _wrap(checkpoint_utils, "load_checkpoint_to_cpu", replace)


def refused(error: UnpicklingError) -> str:
    """Why, in words."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it asks for {named.group(1)}, which no checkpoint of fairseq-train does" if named else "it is damaged, or something else"


def evaluate_settings_only() -> None:
    """fairseq passes settings to Python's eval, those of checkpoints too: --adaptive-softmax-cutoff, --encoder-layers and others."""
    for package in ("criterions", "data", "models", "optim", "tasks", "utils"):
        importlib.import_module(f"fairseq.{package}")
    for name, module in list(sys.modules.items()):
        if name.startswith("fairseq.") and module is not None:
            vars(module)["eval"] = evaluate


class RefusedCode(UsageError, ValueError):
    """What was read is, or could be, a program. A ValueError too: whoever knows which flag gave it says so."""


class Integers(np.ndarray):
    """An array of a checkpoint, the counts of `--eval-bleu`; written down again it is a plain one.

    numpy's own classes do as a pickle tells them, to the point of taking a file's bytes for the addresses of objects. This one
    takes integers of 64 bits, as many as its shape says, and takes them once: numpy frees an array's memory when it
    sets a second state, also where a tensor of the same checkpoint, made by torch's own functions, stands on that
    memory.
    """

    def __new__(cls):
        return super().__new__(cls, (0,), np.int64, buffer=NOTHING)

    def __setstate__(self, state):
        if self.base is not NOTHING:
            raise UnpicklingError("an array that is filled twice")
        _, shape, kind, fortran, content = state
        sizes = type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape)
        if type(kind) is not IntegerType or not sizes or type(content) is not bytes or type(fortran) is not bool:
            raise UnpicklingError("an array of something else than integers of 64 bits")
        count = 1
        for size in shape:
            count *= size
        if len(content) != 8 * count:
            raise UnpicklingError("an array of another size than it says")
        # A copy: numpy writes into the bytes that it is given, which may stand elsewhere in the checkpoint too.
        super().__setstate__((1, shape, np.dtype("int64"), fortran, bytes(bytearray(content))))

    def __reduce_ex__(self, protocol):
        return np.array(self).__reduce_ex__(protocol)


class IntegerType:
    """The type of the elements of `Integers`, in place of numpy's."""

    def __init__(self, name, *_):
        if name != "i8":
            raise UnpicklingError(f"an array of {name!r}, not of integers of 64 bits")

    def __setstate__(self, state):
        if type(state) is not tuple or len(state) < 2 or state[1] != "<":
            raise UnpicklingError("an array of another byte order than this machine's")


def rebuild_array(*_) -> Integers:
    """In place of the function by which numpy begins an array."""
    return Integers()


def checkpoint_types() -> List[object]:
    """For `torch.serialization.add_safe_globals`: what checkpoints of fairseq hold, and nothing else.

    The model's arguments are a Namespace. Checkpoints written with numpy 1 know the rebuilding function by its former name.
    """
    return [
        argparse.Namespace,
        (Integers, "numpy.ndarray"),
        (IntegerType, "numpy.dtype"),
        (rebuild_array, "numpy.core.multiarray._reconstruct"),
        (rebuild_array, "numpy._core.multiarray._reconstruct"),
    ]


def evaluate(text: object, *_) -> object:
    """In place of Python's `eval`, with which fairseq reads settings such as "10000,50000" or "[(512, 3)] * 20".

    Numbers, text, lists, tuples, dictionaries, and +, - and * of them; other settings of models are programs.

    Raises:
        RefusedCode: it is anything else.
        TypeError: it is no text, as of `eval`.
    """
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"a setting to evaluate must be text, not {type(text).__name__}")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        shown = repr(text)[:80]
        raise RefusedCode(f"a setting is {shown}, and only numbers, lists and the like are evaluated: correct the flag or the "
                          "checkpoint that it comes from") from None


def _value(node: ast.AST) -> object:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return _combine(type(node.op), _value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_value(element) for element in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    return ast.literal_eval(node)


def _combine(kind: type, left, right):
    sizes = [len(each) if isinstance(each, (str, bytes, list, tuple)) else None for each in (left, right)]
    if kind is ast.Mult and sizes != [None, None]:
        size, times = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
        if size * times > LARGEST:
            raise ValueError("too long")
    return OPERATORS[kind](left, right)
