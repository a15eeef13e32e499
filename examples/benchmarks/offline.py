"""Continuations per second of a language model, as `fairseq-earm-sample` draws them, beside fairseq's generator."""
from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

import torch
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from models import language_model, prefixes, symbols_of
from tables import Row, Setting, Table
from timing import Variant, compare

from fairseq_earm.sampling.continuation import ContinuationSampler

QUICK = [["small", 10000, 16, 4]]
FULL = [["small", 10000, 16, 4], ["small", 40000, 16, 4], ["base", 10000, 16, 4]]


def rows(
    setting: Setting, cases: Sequence[Tuple[str, int, int, int]] = QUICK, prefix: int = 40, length: int = 20
) -> List[Row]:
    """Of the continuations of a batch.

    Args:
        cases: model of `models.language_model`, symbols of its vocabulary, prefixes in a batch, samples of each.
        prefix, length: tokens of a prefix and of a continuation.
    """
    found: List[Row] = []
    for size, vocabulary, batch, samples in cases:
        torch.manual_seed(1)
        model = setting.place(language_model(size, vocabulary))
        costs = compare(variants(model, batch, samples, prefix, length), setting.rounds)
        found += [
            {
                "model": size, "vocabulary": vocabulary, "rows": batch * samples, "sampler": name, "continuations/s": cost.rate,
                "of fairseq's": 1 / cost.ratio, "MB": cost.megabytes,
            }
            for name, cost in costs.items()
        ]
    return found


def variants(model, batch: int, samples: int, prefix: int, length: int) -> Dict[str, Variant]:
    """fairseq's `SequenceGenerator` with forced prefixes, and ours."""
    symbols = symbols_of(model)
    given = prefixes(symbols, batch, prefix)
    repeated = given.repeat_interleave(samples, 0)
    sample = {"net_input": {"src_tokens": repeated, "src_lengths": torch.full_like(repeated[:, 0], prefix)}}
    generator = SequenceGenerator(
        [model], symbols, beam_size=1, max_len_a=0, max_len_b=prefix + length - 1, search_strategy=Sampling(symbols)
    )
    sampler = ContinuationSampler(symbols, length)
    return {
        "fairseq": lambda: len(generator.generate([model], sample, prefix_tokens=repeated)),
        "fairseq-earm-sample": lambda: sampler(model, given, samples).tokens.size(0),
    }


TABLE = Table(
    "Continuations of a language model",
    {"model": "", "vocabulary": ",", "rows": ",", "sampler": "", "continuations/s": ",.1f", "of fairseq's": ".2f", "MB": ",.0f"},
    rows, {"cases": QUICK}, {"cases": FULL},
)
