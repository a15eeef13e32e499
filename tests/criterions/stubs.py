"""As much of fairseq as the criterion touches, and negatives that are known in advance."""
from __future__ import annotations

from argparse import Namespace
from dataclasses import fields

import torch

from fairseq_earm.criterions.earm_config import EarmCrossEntropyConfig
from fairseq_earm.criterions.earm_cross_entropy import EarmCrossEntropyCriterion
from fairseq_earm.sampling.samples import Samples
from tests.tiny_model import tiny_batch


class Task:
    """As much of a fairseq task as a criterion touches."""

    def __init__(self, dictionary, positions=(64, 64)):
        self.target_dictionary = dictionary
        self.positions = positions
        self.stepped = 0

    def max_positions(self):
        return self.positions

    def begin_epoch(self, epoch, model):
        pass

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        loss, *rest = criterion(model, sample)
        (loss * 0 if ignore_grad else loss).backward()
        return (loss, *rest)

    def optimizer_step(self, optimizer, model, update_num):
        self.stepped += 1


def config(**flags):
    """The criterion's defaults, with E-ARM from the first epoch."""
    values = {field.name: field.default for field in fields(EarmCrossEntropyConfig)}
    values.update(sentence_avg=False, max_epoch=0, max_update=0, clip_norm=0.0, earm_start_epoch=1)
    return Namespace(**{**values, **flags})


def build(model, **flags):
    return EarmCrossEntropyCriterion(Task(model.decoder.dictionary), config(**flags))


def batch(model, rows=((5, 4), (4, 4, 5), (5,))):
    """A batch with right-padded targets of different lengths."""
    dictionary = model.decoder.dictionary
    target = torch.full((len(rows), max(map(len, rows)) + 1), dictionary.pad())
    for i, row in enumerate(rows):
        target[i, : len(row) + 1] = torch.tensor([*row, dictionary.eos()])
    net_input = tiny_batch(model, lengths=(3, 2, 4))
    first = torch.full((len(rows), 1), dictionary.eos())
    previous = torch.cat([first, target[:, :-1].masked_fill(target[:, :-1] == dictionary.eos(), dictionary.pad())], 1)
    net_input["prev_output_tokens"] = previous
    return {"net_input": net_input, "target": target, "ntokens": int(target.ne(dictionary.pad()).sum()), "nsentences": len(rows)}


class FixedSampler:
    """Negatives that are known in advance: (sequence, source row, truncated)."""

    def __init__(self, model, rows):
        self.pad, self.rows = model.decoder.dictionary.pad(), rows

    def __call__(self, model, net_input, negatives, prefix_tokens=None):
        assert model.training
        width = max(len(sequence) for sequence, _, _ in self.rows)
        tokens = torch.full((len(self.rows), width), self.pad)
        for i, (sequence, _, _) in enumerate(self.rows):
            tokens[i, : len(sequence)] = torch.tensor(sequence)
        given = 0 if prefix_tokens is None else prefix_tokens.size(1)
        mask = tokens.ne(self.pad)
        mask[:, :given] = False
        sources = torch.tensor([source for _, source, _ in self.rows])
        truncated = torch.tensor([cut for _, _, cut in self.rows])
        return Samples(tokens, mask, torch.zeros(tokens.shape), truncated, sources)


NEGATIVES = [((4, 2), 0, False), ((5, 5, 4), 0, True), ((4, 5, 2), 1, False), ((5, 2), 1, False), ((5, 4, 5, 4), 2, True), ((5, 4, 2), 2, False)]
