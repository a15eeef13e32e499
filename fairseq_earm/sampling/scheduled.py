"""Scheduled sampling for decoders that read all steps at once: two passes (Mihaylova & Martins 2019).

The first pass is teacher-forced. What it predicts at step k − 1 takes the place of the data's token as the input of
step k with probability 1 − p, independently at each step (Bengio et al. 2015). The second pass reads this mixture, and
what it says is what the criterion gets to see. Both have dropout, and drop the same units: they are passes of one
network, and one and the same where nothing is replaced.
"""
from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Optional

import torch
from fairseq.models import FairseqDecoder
from torch import Tensor, nn

from fairseq_earm.ebm.energy import widen
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.draw import draw, without_padding
from fairseq_earm.sampling.isolation import own_randomness
from fairseq_earm.sampling.joint_forward import unwrapped
from fairseq_earm.sampling.scoring import full_logits

SCHEDULES = ("none", "constant", "linear", "exponential", "inverse-sigmoid")
PREDICTIONS = ("argmax", "sample", "topk-mix")

# Negatives are drawn for the same tokens, from the same global state where there is no dropout.
SALT = 2**31


class Schedule(NamedTuple):
    """Teacher-forcing probability p by the number i of updates since `start_update` (Bengio et al. 2015, section 2.4).

    With p₀ = `start` and ε = `minimum`, p = max(ε, ·) of

    * constant: p₀
    * linear: p₀ − c·i, its slope c such that p is ε after `decay_updates` updates
    * exponential: p₀·kⁱ, k = `rate` below 1
    * inverse-sigmoid: p₀·k / (k + exp(i/k)), k = `rate` of at least 1

    and p = 1 before `start_update`.
    """

    kind: str
    start: float = 1.0
    minimum: float = 0.0
    decay_updates: int = 0
    rate: float = 0.0
    start_update: int = 0

    def probability(self, updates: int) -> float:
        """p of the update that follows on so many updates."""
        since = updates - self.start_update
        return 1.0 if since < 0 else max(self.minimum, self._decayed(since))

    def _decayed(self, since: int) -> float:
        if self.kind == "linear":
            return self.start - (self.start - self.minimum) * since / self.decay_updates
        if self.kind == "exponential":
            return self.start * self.rate**since
        if self.kind == "inverse-sigmoid":
            exponent = since / self.rate - math.log(self.rate)
            return self.start / (1 + math.exp(min(exponent, 700.0)))  # exp of more is no float
        return self.start


class Predictions(NamedTuple):
    """What the second pass reads in the place of a token.

    Attributes:
        kind: the likeliest token (argmax), one drawn from the softmax (sample), or the mean of the embeddings of the
            `topk` likeliest tokens, weighted by their renormalised probabilities (topk-mix).
        topk: tokens in a mixture.
        temperature: divides the logits of samples and mixtures.
        through_first_pass: whether the mixture's weights hand the gradient on to the first pass.
    """

    kind: str = "argmax"
    topk: int = 5
    temperature: float = 1.0
    through_first_pass: bool = False


class Mixture(NamedTuple):
    """Tokens (R, k) and their weights (R, k), in the decoder's input at (R,) rows and (R,) steps."""

    tokens: Tensor
    weights: Tensor
    places: tuple


def replaceable(tokens: Tensor, pad: int, given: int = 0) -> Tensor:
    """(B, T) steps whose input may be the model's own.

    Never padding, the start token, which nothing predicts, and `given` tokens after it, which generation is given too.

    Args:
        tokens: (B, T) decoder input, padded on either side.
    """
    real = tokens.ne(pad)
    return real & (real.cumsum(1) > 1 + given)


def check_decoder(model, predictions: Predictions) -> None:
    """Refuse models that scheduled sampling cannot be done with.

    Raises:
        UsageError: one line that names the cause and the remedy.
    """
    decoder, kind = getattr(model, "decoder", None), type(model).__name__
    if not isinstance(decoder, FairseqDecoder):
        raise UsageError(f"--scheduled-sampling: {kind} has no decoder to feed; give a model that has one, or leave the flag out")
    if predictions.kind == "topk-mix" and not isinstance(getattr(decoder, "embed_tokens", None), nn.Module):
        raise UsageError(
            f"--scheduled-sampling-prediction topk-mix: the decoder of {kind} has no embed_tokens whose output could be "
            "mixed; give argmax or sample"
        )


_kept = ContextVar("teacher_forced_logits_are_kept", default=False)


@contextmanager
def keep_teacher_forced():
    """Have the first pass of forwards in here leave its logits, with their gradient, in the net output.

    They are `net_output[1]["teacher_forced"]`, (B, T, V); an adaptive softmax's as `full_logits` gives them. The entry
    is missing where there was one pass only, whose logits those are anyway.
    """
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def teacher_forced(net_output: tuple) -> Optional[Tensor]:
    """(B, T, V) logits that `keep_teacher_forced` left in a net output; None where there was one pass only."""
    extra = net_output[1]
    return extra.get("teacher_forced") if isinstance(extra, dict) else None


@contextmanager
def scheduled_sampling(model, probability: float, predictions: Predictions, *, given: int = 0):
    """Have the data's pass of each forward of the model in training mode become two, as above.

    The first call of the decoder within a forward is the data's; those that follow (negatives) are left alone, and so
    is everything outside the model's forward. Each pass takes the random numbers that a single one would have taken,
    predictions have their own. At p = 1 there is one pass.

    Args:
        model: the model as the criterion gets it, wrapped or not.
        probability: p, of teacher forcing.
        given: tokens after the start token that are never replaced.
    """
    if probability >= 1:
        yield
        return
    # A hook before the decoder would not get keyword arguments with torch 1; a forward in its place does. It also runs
    # inside of other hooks, in whatever order they come, and the first pass does not set them off.
    decoder = model.decoder
    passes = _TwoPasses(decoder, probability, predictions, given)
    hook = unwrapped(model).register_forward_pre_hook(passes.begin)
    decoder.forward = passes
    try:
        yield
    finally:
        hook.remove()
        del decoder.forward


class _TwoPasses:
    """Stands in for a decoder's forward."""

    plain_in_eval_mode = True  # for `sampling.plain_layers`

    def __init__(self, decoder, probability: float, predictions: Predictions, given: int):
        self.decoder = decoder
        self.forward = decoder.forward
        self.probability = probability
        self.predictions = predictions
        self.given = given
        self.pad = decoder.dictionary.pad()
        self.data_is_next = False

    def begin(self, module, inputs) -> None:
        """Called as a forward of the model begins."""
        self.data_is_next = True

    def __call__(self, *args, **kwargs):
        if not (self.data_is_next and self.decoder.training):
            return self.forward(*args, **kwargs)
        self.data_is_next = False
        if not args:
            raise UsageError(
                f"--scheduled-sampling: the model does not hand {type(self.decoder).__name__} the tokens before each step as "
                "its first argument, so it is no decoder that goes on from them; leave the flag out"
            )
        tokens, *rest = args
        # Also where nothing will be chosen: sharded workers wait for each other in every pass.
        with torch.random.fork_rng(devices=[tokens.device] if tokens.device.type == "cuda" else []):
            first = self._first_pass(tokens, *rest, **kwargs)
        with own_randomness(tokens, SALT):
            chosen = torch.rand(tokens.shape, device=tokens.device) >= self.probability
            places = (chosen & replaceable(tokens, self.pad, self.given)).nonzero(as_tuple=True)
            mixture = self._mixture(first, places)
        output = self._second_pass(mixture, tokens, *rest, **kwargs)
        return _with_teacher_forced(output, full_logits(self.decoder, first)) if _kept.get() else output

    def _first_pass(self, tokens, *args, **kwargs) -> tuple:
        gradient = torch.is_grad_enabled() and (_kept.get() or self.predictions.through_first_pass)
        if hasattr(self.decoder, "select_memory"):  # read, but not brought up to date, which is for the second pass to do
            kwargs["memory"] = self.decoder.select_memory(torch.arange(tokens.size(0), device=tokens.device))
        with torch.set_grad_enabled(gradient):
            first = self.forward(tokens, *args, **kwargs)
        if not gradient:
            torch.clear_autocast_cache()  # older torch would give the second pass the first one's casts, without gradient
        return first

    def _mixture(self, first: tuple, places: tuple) -> Mixture:
        """What to read at `places`: the prediction of the step before, padding excepted."""
        rows, steps = places
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.predictions.through_first_pass):
            logits = widen(full_logits(self.decoder, (first[0][rows, steps - 1],)))
            logits = without_padding(logits, self.pad) / self.predictions.temperature
            if self.predictions.kind == "topk-mix":
                likeliest = logits.topk(self.predictions.topk, dim=-1)
                return Mixture(likeliest.indices, likeliest.values.softmax(-1), places)
            tokens = (logits.argmax(-1) if self.predictions.kind == "argmax" else draw(logits)[0]).unsqueeze(1)
            return Mixture(tokens, torch.ones_like(tokens, dtype=logits.dtype), places)

    def _second_pass(self, mixture: Mixture, tokens, *args, **kwargs) -> tuple:
        if self.predictions.kind != "topk-mix":
            return self.forward(tokens.index_put(mixture.places, mixture.tokens.squeeze(1)), *args, **kwargs)
        mixed = False

        def mix(module, inputs, output):
            nonlocal mixed
            hook.remove()
            mixed = True
            embedded = (module(mixture.tokens) * mixture.weights.unsqueeze(-1)).sum(1)
            return output.index_put(mixture.places, embedded.to(output))

        hook = self.decoder.embed_tokens.register_forward_hook(mix)
        try:
            output = self.forward(tokens, *args, **kwargs)
        finally:
            hook.remove()
        if not mixed:
            raise UsageError(
                f"--scheduled-sampling-prediction topk-mix: {type(self.decoder).__name__} does not call its embed_tokens, so "
                "nothing was mixed; give argmax or sample"
            )
        return output


def _with_teacher_forced(output: tuple, logits: Tensor) -> tuple:
    """The net output with one more entry; decoders whose second output is attention alone get fairseq's usual dict."""
    extra = output[1] if isinstance(output[1], dict) else {"attn": [output[1]]}
    return (output[0], {**extra, "teacher_forced": logits}, *output[2:])
