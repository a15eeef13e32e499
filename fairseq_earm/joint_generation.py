"""Text drawn from a joint model P_LM · exp(−E): many continuations from the base, one of them drawn by its energy
(Deng et al. 2020, Algorithm 1), behind the interface of fairseq's generators.
"""
from __future__ import annotations

import logging
import math
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fairseq_earm.ebm.weights import effective_sample_size, resample
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.sampling.layout import prefix_continuation

logger = logging.getLogger(__name__)

# With a smaller effective sample size the draw is little more than the best of a few candidates.
LOW_SAMPLE_SIZE = 10.0
# Tokens in one pass where nothing says how many: what fairseq-generate takes by default.
DEFAULT_TOKENS = 12000

Hypotheses = List[List[Dict[str, Tensor]]]


class Candidates(NamedTuple):
    """N continuations of each of B prefixes.

    Attributes:
        tokens: (B, N, T).
        log_q: (B, N, T) log-probability with which each token was drawn, in nats.
        neg_energies: (B, N) −E of prefix and continuation together; 0 where there is no energy network.
    """

    tokens: Tensor
    log_q: Tensor
    neg_energies: Tensor

    def joint_scores(self) -> Tensor:
        """(B, N) log q − E: the joint model's log-probability, but for its log Z."""
        return self.log_q.sum(-1).double() + self.neg_energies.double()


@torch.no_grad()
def draw_candidates(
    base, energy, sampler: ContinuationSampler, prefixes: Tensor, count: int, *, chunk: int,
    generator: Optional[torch.Generator] = None, progress: str = "",
) -> Candidates:
    """Draw `count` continuations of each prefix, and their energies, in chunks that bound the memory it takes.

    Args:
        base: a fairseq language model in eval mode.
        energy: a network (R, L) tokens → (R,) energies in eval mode, or None.
        prefixes: (B, P) tokens without padding.
        chunk: most sequences in one pass through either network.
        generator: of the random numbers, on the prefixes' device.
        progress: what to write before a progress bar over the candidates; none if empty, or not on a terminal.
    Raises:
        UsageError: an energy that is not finite.
    """
    with tqdm(total=prefixes.size(0) * count, desc=progress, leave=False, disable=None if progress else True) as bar:

        def draw(rows: Tensor, samples: int) -> Candidates:
            drawn = sampler(base, rows, samples, generator=generator)
            shape = (rows.size(0), samples)
            neg_energies = drawn.log_q.new_zeros(shape)
            if energy is not None:
                neg_energies = -finite(energy(prefix_continuation(rows, drawn.tokens))).view(shape)
            bar.update(rows.size(0) * samples)
            return Candidates(drawn.tokens.view(*shape, -1), drawn.log_q.view(*shape, -1), neg_energies)

        # Either several prefixes with all their candidates at once, or one prefix in several pieces.
        groups = prefixes.split(max(1, chunk // count))
        pieces = [min(chunk, count - drawn) for drawn in range(0, count, chunk)]
        parts = [_concatenate([draw(rows, samples) for samples in pieces], 1) for rows in groups]
    return _concatenate(parts, 0)


def _concatenate(parts: Sequence[Candidates], dim: int) -> Candidates:
    return Candidates(*(torch.cat(tensors, dim) for tensors in zip(*parts)))


def finite(energies: Tensor) -> Tensor:
    """The energies, every one of them finite; a UsageError otherwise."""
    wrong = int((~energies.isfinite()).sum())
    if wrong:
        raise UsageError(
            f"--energy-path: {wrong} of {energies.numel()} energies are not finite, so that nothing can be drawn by them: take a "
            "checkpoint from before the training diverged, and leave out --fp16"
        )
    return energies


class JointGenerator:
    """What `fairseq-generate` and `fairseq-interactive` call to continue prefixes by a fixed number of tokens.

    Candidates are drawn from the base's softmax, truncated as asked; q is that proposal, and what is drawn follows
    q · exp(−E) in the limit of many candidates. End-of-sentence is a token like any other and ends nothing.

    Of each hypothesis `positional_scores` are log q of its tokens, and `score` is (log q − E) / T^lenpen, in nats.

    Args:
        base: a fairseq language model that writes from left to right, in eval mode.
        length: T, tokens of a continuation.
        energy: the energy network in eval mode, or None to draw from q alone.
        candidates: continuations drawn of each prefix, 2 or more; without an energy it is `nbest`.
        select: "resample" takes the hypotheses by successive draws without replacement, with probability proportional to
            exp(−E): the first is Algorithm 1's. "best" takes those with the highest log q − E.
        nbest: hypotheses of each prefix.
        chunk: most sequences in one pass.
        temperature, topk, topp: of the proposal, see `ContinuationSampler`.
        lenpen: 0 leaves the score undivided.

    Attributes:
        room: most tokens that a prefix may have.
    Raises:
        UsageError: fewer candidates than there is to choose from, a base or an energy without positions for a continuation.
    """

    def __init__(
        self, base, length: int, *, energy=None, candidates: int = 10000, select: str = "resample", nbest: int = 1,
        chunk: int = 64, temperature: float = 1.0, topk: int = -1, topp: float = -1.0, lenpen: float = 1.0,
    ):
        dictionary = base.decoder.dictionary
        if energy is not None and candidates < max(2, nbest):
            raise UsageError(
                f"--energy-candidates {candidates} leaves nothing to choose {nbest} from: give {max(2, nbest)} or more; "
                "the more, the closer to the joint model"
            )
        self.sampler = ContinuationSampler(dictionary, length, temperature=temperature, topk=topk, topp=topp)
        self.pad = dictionary.pad()
        self.symbols_to_strip_from_output = {dictionary.eos()}
        self.energy = energy
        self.candidates = candidates if energy is not None else nbest
        self.select = select
        self.nbest = nbest
        self.chunk = chunk
        self.lenpen = lenpen
        self.room = min(_positions(base), math.inf if energy is None else _positions(energy)) - length
        self._random: Optional[torch.Generator] = None
        self.sample_sizes: List[float] = []

    @torch.no_grad()
    def generate(self, models: Sequence, sample: dict, prefix_tokens: Optional[Tensor] = None, **kwargs) -> Hypotheses:
        """Continue every prefix of a batch.

        Args:
            models: the base, alone.
            sample: of its `net_input` only the device and number of the rows of `src_tokens` are used.
            prefix_tokens: (B, P) tokens, padded on the right where they differ in length; by default nothing is given.
        Raises:
            UsageError: a prefix that leaves no room for the continuation, an energy that is not finite.
        """
        rows = sample["net_input"]["src_tokens"]
        prefixes = rows[:, :0] if prefix_tokens is None else prefix_tokens.to(rows)
        lengths = prefixes.ne(self.pad).sum(1)
        check_prefix(int(lengths.max()), self.sampler.length, self.room)
        hypotheses: Hypotheses = [[] for _ in range(prefixes.size(0))]
        sample_sizes: List[float] = []
        for length in lengths.unique().tolist():
            alike = lengths.eq(length).nonzero().squeeze(1)
            candidates = self._draw(models[0], prefixes[alike, :length])
            sample_sizes += effective_sample_size(candidates.neg_energies.double(), 1).tolist()
            for row, hypothesis in zip(alike.tolist(), self._choose(candidates)):
                hypotheses[row] = hypothesis
        if self.energy is not None:
            self._report(sample_sizes)
        return hypotheses

    def _draw(self, base, prefixes: Tensor) -> Candidates:
        if self._random is None:  # from --seed; on the prefixes' device, known only now
            self._random = torch.Generator(prefixes.device).manual_seed(torch.initial_seed())
        return draw_candidates(
            base, self.energy, self.sampler, prefixes, self.candidates, chunk=self.chunk, generator=self._random,
            progress="" if self.energy is None else "candidates",
        )

    def _choose(self, candidates: Candidates) -> Hypotheses:
        """The `nbest` hypotheses of each row."""
        scores = candidates.joint_scores()
        if self.select == "best":
            order = scores.argsort(1, descending=True)
        else:
            order = resample(candidates.neg_energies, self._random)
        scores = scores / self.sampler.length**self.lenpen
        return [
            [self._hypothesis(candidates.tokens[row, i], scores[row, i], candidates.log_q[row, i]) for i in chosen]
            for row, chosen in enumerate(order[:, : self.nbest].tolist())
        ]

    def _hypothesis(self, tokens: Tensor, score: Tensor, log_q: Tensor) -> Dict[str, Tensor]:
        nothing = tokens.new_empty(0)
        return {"tokens": tokens, "score": score, "positional_scores": log_q, "attention": nothing, "alignment": nothing}

    def _report(self, sample_sizes: List[float]) -> None:
        """Log effective sample sizes so far: neither command tells its generator when it is done."""
        low_before = any(size < LOW_SAMPLE_SIZE for size in self.sample_sizes)
        self.sample_sizes += sample_sizes
        if min(sample_sizes) < LOW_SAMPLE_SIZE and not low_before:
            logger.warning(
                "effective sample size %.1f of %d candidates, below %g: what is drawn follows these few candidates rather than "
                "the joint model; raise --energy-candidates, or train a less extreme energy",
                min(sample_sizes), self.candidates, LOW_SAMPLE_SIZE,
            )
        logger.info(
            "effective sample size of %d candidates: mean %.1f, least %.1f, over %d prefixes so far",
            self.candidates, sum(self.sample_sizes) / len(self.sample_sizes), min(self.sample_sizes), len(self.sample_sizes),
        )


def check_prefix(prefix_length: int, length: int, room: int) -> None:
    """Refuse a prefix that leaves no room for `length` more tokens, see `JointGenerator.room`."""
    if prefix_length > room:
        raise UsageError(
            f"a prefix of {prefix_length} tokens leaves no room for {length} more: with --path and --energy-path it can have "
            f"{room} at most; give a shorter one"
        )


def _positions(model) -> float:
    limit = model.max_positions()
    return math.inf if limit is None else limit


def chunk_of(sequence_length: int, max_tokens: Optional[int] = None) -> int:
    """How many sequences make `max_tokens` tokens, at least one."""
    return max(1, (max_tokens or DEFAULT_TOKENS) // sequence_length)
