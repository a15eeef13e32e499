"""Tokens per second of E-ARM's sampler, of others with the same weights, and of the matrix products alone."""
from __future__ import annotations

import math
from typing import Dict, List, Sequence

import rivals
import torch
from floor import MatrixProducts
from models import real_sources, sources, trained, translation_model
from tables import Row, Setting, Table
from timing import Variant, compare, device

from fairseq_earm.sampling.ancestral import AncestralSampler

FLOOR = "matrix products alone"
LONGEST = 80  # where natural lengths end

QUICK = {"sizes": ["iwslt", "small"], "natural": ["small"], "batches": [128]}
FULL = {"sizes": ["iwslt", "small"], "natural": ["iwslt", "small"], "batches": [32, 128, 512]}


def rows(
    setting: Setting, sizes: Sequence[str] = ("iwslt", "small"), vocabulary: int = 10000, batches: Sequence[int] = (128,),
    length: int = 30, natural: Sequence[str] = ("iwslt", "small"), mean: float = 20,
) -> List[Row]:
    """Of one translation per source sentence: exactly `length` tokens each, and about `mean` on average.

    Args:
        sizes: of `models.translation_model`.
        vocabulary: symbols of it.
        batches: source sentences, each batch on its own; they have length/2 to `length` tokens.
        natural: those of `sizes` that natural lengths are drawn from too.
    """
    found: List[Row] = []
    for size in sizes:
        for ends in ([False, True] if size in natural else [False]):
            torch.manual_seed(1)
            model = setting.place(translation_model(size, vocabulary, length=mean if ends else math.inf))
            lengths, longest = (f"about {mean:g}", LONGEST) if ends else (f"{length}", length)
            for batch in batches:
                what = {"model": size, "sources": batch, "length": lengths}
                found += _compared(what, setting, model, sources(model, batch, length), longest)
    if setting.checkpoint:
        model, _, task = trained(setting.checkpoint, setting.data)
        for batch in batches:
            what = {"model": "trained", "sources": batch, "length": "natural"}
            found += _compared(what, setting, setting.place(model), real_sources(task, batch), LONGEST)
    return found


def _compared(what: Row, setting: Setting, model, net_input: dict, longest: int) -> List[Row]:
    costs = compare(variants(model, net_input, longest, setting.threads), setting.rounds)
    floor = costs[FLOOR].rate
    return [
        {
            **what, "sampler": name, "tokens/s": cost.rate, "of fairseq's": 1 / cost.ratio, "of the floor": cost.rate / floor,
            "MB": None if name == "CTranslate2" and device().type == "cuda" else cost.megabytes,  # torch cannot see it
        }
        for name, cost in costs.items()
    ]


def variants(model, net_input: dict, longest: int, threads: int) -> Dict[str, Variant]:
    """All samplers that are installed, fairseq's first, and the matrix products of one of our draws."""
    sampler = AncestralSampler(model.decoder.dictionary, max_len_a=0, max_len_b=longest)
    lengths = sampler(model, net_input).mask.sum(1)
    alive = [int((lengths > step).sum()) for step in range(int(lengths.max()))]

    def ours() -> int:
        torch.rand(1)  # else it would draw the same again
        return int(sampler(model, net_input).mask.sum())

    found = {"fairseq": rivals.fairseqs_generator(model, net_input, longest)}
    if rivals.installed("transformers") and rivals.is_marian(model):
        found["Hugging Face"] = rivals.hugging_faces_generate(model, net_input, longest)
    if rivals.installed("ctranslate2"):
        found["CTranslate2"] = rivals.ctranslate2s(model, net_input, longest, threads=threads)
    return {**found, "E-ARM": ours, FLOOR: MatrixProducts(model, *net_input["src_tokens"].shape, alive)}


TABLE = Table(
    "Sampling",
    {"model": "", "sources": ",", "length": "", "sampler": "", "tokens/s": ",.0f", "of fairseq's": ".2f", "of the floor": ".0%", "MB": ",.0f"},
    rows, QUICK, FULL,
)
