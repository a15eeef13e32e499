"""What --earm-sampling-bf16 gains, and how far its negatives are from the model's own distribution."""
from __future__ import annotations

import math
from typing import List, Sequence

import torch
from models import real_sources, sources, trained, translation_model
from tables import Row, Setting, Table
from timing import compare, device

from fairseq_earm.ebm.products import bf16_helps
from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.draw import without_padding
from fairseq_earm.sampling.isolation import isolated
from fairseq_earm.sampling.scoring import decoder_input, start_tokens

LONGEST = 80
QUICK = {"sizes": ["iwslt"], "batch": 128}
FULL = {"sizes": ["iwslt", "small"], "batch": 128}


def rows(
    setting: Setting, sizes: Sequence[str] = ("iwslt",), vocabulary: int = 10000, batch: int = 128, length: int = 30,
    negatives: int = 4,
) -> List[Row]:
    """Tokens per second, and KL(drawn from ‖ model) in nats a token, estimated from what was drawn.

    Args:
        sizes: of `models.translation_model`; a trained model comes on top.
        vocabulary: symbols of it.
        batch, length: source sentences, and the most tokens of them.
        negatives: for each source, of the samples that the divergence is estimated from.
    """
    if not bf16_helps(device()):
        return []
    found: List[Row] = []
    for size in sizes:
        torch.manual_seed(1)
        found += _rows(size, setting, setting.place(translation_model(size, vocabulary, length=20)), sources, batch, length, negatives)
    if setting.checkpoint:
        model, _, task = trained(setting.checkpoint, setting.data)
        found += _rows("trained", setting, setting.place(model), lambda _, rows, __: real_sources(task, rows), batch, length, negatives)
    return found


def _rows(name: str, setting: Setting, model, read, batch: int, length: int, negatives: int) -> List[Row]:
    net_input = read(model, batch, length)
    samplers = {
        "float32": AncestralSampler(model.decoder.dictionary, max_len_a=0, max_len_b=LONGEST),
        "bfloat16": AncestralSampler(model.decoder.dictionary, max_len_a=0, max_len_b=LONGEST, bf16=True),
    }

    def drawing(sampler):
        def draw() -> int:
            torch.rand(1)  # else it would draw the same again
            return int(sampler(model, net_input).mask.sum())

        return draw

    costs = compare({name: drawing(sampler) for name, sampler in samplers.items()}, setting.rounds)
    return [
        {
            "model": name, "products": products, "tokens/s": costs[products].rate, "of float32's": 1 / costs[products].ratio,
            **divergence(model, net_input, sampler, negatives),
        }
        for products, sampler in samplers.items()
    ]


def divergence(model, net_input: dict, sampler: AncestralSampler, negatives: int) -> Row:
    """Mean of log q drawn from − log q of the model over the tokens drawn, its standard error, and the largest of it."""
    samples = sampler(model, net_input, negatives)
    inputs = {name: net_input[name] for name in ("src_tokens", "src_lengths")}
    with isolated(model, net_input["src_tokens"]):
        encoder_out = model.encoder.reorder_encoder_out(model.encoder(**inputs), samples.sources)
        read = decoder_input(samples.tokens, start_tokens(net_input, sampler.eos)[samples.sources])
        logits = without_padding(model.decoder(read, encoder_out=encoder_out)[0].float(), sampler.pad)
        exact = logits.log_softmax(-1).gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1)
    apart = (samples.log_q - exact)[samples.mask].double()
    return {
        "KL a token": apart.mean().item(), "±": apart.std().item() / math.sqrt(apart.numel()), "largest": apart.abs().max().item(),
    }


TABLE = Table(
    "Negatives in bfloat16",
    {"model": "", "products": "", "tokens/s": ",.0f", "of float32's": ".2f", "KL a token": ".1e", "±": ".0e", "largest": ".2g"},
    rows, QUICK, FULL,
)
