"""Where tasks take negatives from: a frozen base model, or samples drawn from it beforehand."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Optional

import numpy as np
import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.distributed.utils import get_global_rank
from torch import Tensor

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.sampling.frozen import FrozenModel, file_hash
from fairseq_earm.sampling.store import SampleStore
from fairseq_earm.tasks.checks import report_other_proposal

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BaseDtype = ChoiceEnum(list(DTYPES))


class OnlineContinuations:
    """Continuations that a frozen language model draws on the spot, from random numbers of its own."""

    def __init__(self, base: FrozenModel, sampler: ContinuationSampler):
        self.base = base
        self.sampler = sampler

    def __call__(self, sample: dict, count: int, seed: int) -> Tensor:
        """(B·count, T) continuations, `count` of one prefix after the other."""
        prefixes = sample["net_input"]["src_tokens"][:, : -self.sampler.length]
        generator = torch.Generator(prefixes.device).manual_seed(seed)
        return self.sampler(self.base.to(prefixes.device).model, prefixes, count, generator=generator).tokens


class StoredContinuations:
    """Continuations drawn beforehand by `fairseq-earm-sample`, one store for each split.

    Args:
        base_lm: checkpoint they must have been drawn from; None leaves that unchecked.
    Raises:
        UsageError: it cannot be read.
    """

    def __init__(self, base_lm: Optional[str]):
        self.base_lm = base_lm
        self.base_hash = None if base_lm is None else file_hash(base_lm, flag="--base-lm")
        self.stores = {}

    def add(self, split: str, store: SampleStore, count: int) -> None:
        """Use `store` for the sequences of a split.

        Raises:
            UsageError: it holds fewer than `count` continuations of a prefix, or those of another base model.
        """
        if self.base_hash not in (None, store.record["checkpoint_sha256"]):
            raise UsageError(
                f"--base-lm {self.base_lm}: {store.path} was drawn from another checkpoint, {store.record['checkpoint']}; "
                "give that one, or none, or make the samples again"
            )
        if store.samples < count:
            raise UsageError(
                f"--nce-negatives-per-positive {count}: {store.path} holds {store.samples} continuations of a prefix; give no "
                "more, or make more of them"
            )
        made = store.record
        report_other_proposal(
            store.path, temperature=made["temperature"], topk=made["sampling_topk"], topp=made["sampling_topp"]
        )
        self.stores[split] = store

    def __call__(self, sample: dict, count: int, seed: int) -> Tensor:
        """(B·count, T) continuations chosen uniformly, `count` of one prefix after the other."""
        rng, store = np.random.default_rng(seed), self.stores[sample["split"]]
        drawn = [store.draw(index, count, rng) for index in sample["id"].tolist()]
        return torch.cat(drawn).long().to(sample["net_input"]["src_tokens"].device)


def draw_seed(ids: Tensor, *, training: bool) -> int:
    """Seed of the negatives of one batch: fresh in each update of a training, the same in each validation.

    Before an update the trainer seeds torch by --seed and the number of updates, so that a resumed run draws what the
    uninterrupted one does. The rank tells workers apart, which are all seeded alike, and the sentences the batches of
    one update.

    Args:
        ids: the batch's `id`.
        training: whether the batch is one of an update.
    """
    moment = [torch.initial_seed() % 2**64, get_global_rank()] if training else []
    return int(np.random.SeedSequence([*moment, *ids.tolist()]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def own_random_numbers(seed: int, device: torch.device):
    """torch's global stream begins with this seed, and goes on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
