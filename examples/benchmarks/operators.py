"""Where the time of sampling goes: a profile of fairseq's generator, of fairseq's own steps under our sampler, and of ours."""
from __future__ import annotations

import math
from typing import Dict, List, Sequence

import rivals
import torch
from models import sources, translation_model
from tables import Row, Setting, Table
from timing import Variant
from torch.profiler import ProfilerActivity, profile

from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.transformer_steps import TransformerSteps

# The first that an operator's name contains is its kind. What runs within another operator is counted there.
KINDS = {
    "products with weights": ("addmm", "::mm", "linear_pointwise", "reorder_linear", "_addmm_activation"),
    "attention": ("bmm", "scaled_dot_product", "baddbmm"),
    "drawing": ("multinomial", "exponential", "cumsum", "searchsorted", "sort", "topk", "gather"),
    "copies": ("copy", "cat", "index", "fill", "empty", "zero", "clone", "masked_select", "nonzero"),
}
REST = "everything else"
QUICK = {"sizes": ["iwslt", "small"]}


def rows(setting: Setting, sizes: Sequence[str] = ("iwslt", "small"), vocabulary: int = 10000, batch: int = 128, length: int = 30) -> List[Row]:
    """Seconds of each kind of operator in one draw of `length` tokens for each source; the second draw, the first warms up.

    Args:
        sizes: of `models.translation_model`.
        vocabulary: symbols of it.
        batch: source sentences, of length/2 to `length` tokens.
    """
    found: List[Row] = []
    for size in sizes:
        torch.manual_seed(1)
        model = setting.place(translation_model(size, vocabulary, length=math.inf))
        net_input = sources(model, batch, length)
        found += [{"model": size, "sampler": name, **seconds(draw)} for name, draw in samplers(model, net_input, length).items()]
    return found


def samplers(model, net_input: dict, length: int) -> Dict[str, Variant]:
    """By name, what each draws by."""
    ours = AncestralSampler(model.decoder.dictionary, max_len_a=0, max_len_b=length)

    def without_quick_steps():
        knows = TransformerSteps.knows
        TransformerSteps.knows = staticmethod(lambda decoder: False)
        try:
            return ours(model, net_input)
        finally:
            TransformerSteps.knows = knows

    return {
        "fairseq": rivals.fairseqs_generator(model, net_input, length),
        "E-ARM, fairseq's steps": without_quick_steps,
        "E-ARM": lambda: ours(model, net_input),
    }


def seconds(draw: Variant) -> Row:
    """Of each kind of operator, on the processor and on the GPU."""
    draw()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]) as measured:
        draw()
    spent = dict.fromkeys([*KINDS, REST], 0.0)
    for event in measured.key_averages():
        on_gpu = getattr(event, "self_device_time_total", getattr(event, "self_cuda_time_total", 0))
        spent[kind(event.key)] += (on_gpu if torch.cuda.is_available() else event.self_cpu_time_total) / 1e6
    return {**spent, "all": sum(spent.values())}


def kind(operator: str) -> str:
    """Of an operator's name."""
    return next((kind for kind, names in KINDS.items() if any(name in operator for name in names)), REST)


TABLE = Table(
    "Where the time of sampling goes, seconds",
    {"model": "", "sampler": "", **dict.fromkeys([*KINDS, REST, "all"], ".2f")}, rows, QUICK, QUICK,
)
