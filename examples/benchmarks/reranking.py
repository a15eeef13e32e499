"""Candidates per second: translations ordered by the model's own energy, and continuations drawn by an energy network."""
from __future__ import annotations

from argparse import Namespace
from typing import Dict, List, Sequence

import torch
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from models import language_model, prefixes, sources, symbols_of, translation_model
from tables import Row, Setting, Table
from timing import Cost, Variant, compare, device

from fairseq_earm.joint_generation import JointGenerator
from fairseq_earm.models.energy_transformer import BidirectionalEnergyTransformer, EnergyTransformerBitConfig
from fairseq_earm.reranking import EnergyReranker, candidate_log_mu

QUICK = {"sizes": ["small"], "vocabulary": 10000, "batch": 16, "beam": 8, "length": 20, "starts": 2, "candidates": 64}
FULL = {"sizes": ["small", "iwslt"], "vocabulary": 10000, "batch": 32, "beam": 10, "length": 30, "starts": 4, "candidates": 1000}


def rows(
    setting: Setting, sizes: Sequence[str] = ("small",), vocabulary: int = 10000, batch: int = 16, beam: int = 8, length: int = 20,
    starts: int = 2, candidates: int = 64,
) -> List[Row]:
    """Of reranking beside fairseq's generation alone, and of joint generation beside drawing from the base alone.

    Args:
        sizes: of `models.translation_model`.
        batch, beam, length: source sentences, hypotheses of each and tokens of these, drawn with `--sampling`.
        starts, candidates: prefixes of joint generation, and continuations of each; both of `length` tokens.
    """
    found: List[Row] = []
    for size in sizes:
        variants = reranked(setting.place(translation_model(size, vocabulary)), batch, beam, length)
        found += _named({"what": f"translations, {size}", "candidates": batch * beam}, compare(variants, setting.rounds))
    variants = joint(setting, vocabulary, starts, candidates, length)
    return found + _named({"what": "continuations, small", "candidates": starts * candidates}, compare(variants, setting.rounds))


def _named(what: Row, costs: Dict[str, Cost]) -> List[Row]:
    return [
        {**what, "generator": name, "candidates/s": cost.rate, "time of the first's": cost.ratio, "MB": cost.megabytes}
        for name, cost in costs.items()
    ]


def reranked(model, batch: int, beam: int, length: int) -> Dict[str, Variant]:
    """fairseq's generator by sampling, the same one wrapped, and the scoring of known candidates alone."""
    net_input = sources(model, batch, length)
    words = symbols_of(model)
    stock = SequenceGenerator([model], words, beam_size=beam, max_len_a=0, max_len_b=length - 1, search_strategy=Sampling(words))
    wrapped = EnergyReranker(stock, [model])
    hypotheses = stock.generate([model], {"net_input": net_input})

    def count(found: list) -> int:
        return sum(map(len, found))

    return {
        "fairseq": lambda: count(stock.generate([model], {"net_input": net_input})),
        "reranked by energy": lambda: count(wrapped.generate([model], {"net_input": net_input})),
        "energies of known candidates": lambda: _score(model, net_input, hypotheses),
    }


@torch.no_grad()
def _score(model, net_input: dict, hypotheses: list) -> int:
    return candidate_log_mu([model], net_input, hypotheses).numel()


def joint(setting: Setting, vocabulary: int, count: int, candidates: int, length: int) -> Dict[str, Variant]:
    """Continuations of a language model, with and without a bidirectional energy network of 2 layers to choose among them."""
    base = setting.place(language_model("small", vocabulary))
    energy = setting.place(energy_network(symbols_of(base)))
    given = prefixes(symbols_of(base), count, length)
    alone = JointGenerator(base, length, nbest=candidates, chunk=64)
    chosen = JointGenerator(base, length, energy=energy, candidates=candidates, chunk=64)

    def generate(generator) -> int:
        generator.generate([base], {"net_input": {"src_tokens": given}}, prefix_tokens=given)
        return count * candidates

    return {"base alone": lambda: generate(alone), "drawn by energy": lambda: generate(chosen)}


def energy_network(symbols):
    """A bidirectional one of 2 layers, dimension 128, with random weights, in eval mode."""
    cfg = EnergyTransformerBitConfig(encoder_layers=2, encoder_embed_dim=128, encoder_ffn_embed_dim=512, encoder_attention_heads=4)
    return BidirectionalEnergyTransformer.build_model(cfg, Namespace(source_dictionary=symbols)).to(device()).eval()


TABLE = Table(
    "Reranking and joint generation",
    {"what": "", "candidates": ",", "generator": "", "candidates/s": ",.1f", "time of the first's": ".2f", "MB": ",.0f"},
    rows, QUICK, FULL,
)
