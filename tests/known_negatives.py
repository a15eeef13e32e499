"""Negatives that follow from their sources alone, for workers that must have those that one worker would have."""
from __future__ import annotations

import torch


def known_negatives(model, net_input, *unused):
    """In place of drawing: for each source one target, the first few of its words read as the target's."""
    from fairseq_earm.sampling.samples import Samples

    dictionary = model.decoder.dictionary
    eos, pad, first = dictionary.eos(), dictionary.pad(), dictionary.nspecial
    sources = [[token for token in row if token >= first] for row in net_input["src_tokens"].tolist()]
    targets = [[*row[: sum(row) % 5], eos] for row in sources]
    tokens = torch.full((len(targets), max(map(len, targets))), pad)
    for row, target in zip(tokens, targets):
        row[: len(target)] = torch.tensor(target)
    nobody = torch.zeros(len(targets), dtype=torch.bool)
    return Samples(tokens, tokens.ne(pad), torch.zeros(tokens.shape), nobody, torch.arange(len(targets)))
