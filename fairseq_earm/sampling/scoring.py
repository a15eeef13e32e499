"""Teacher-forced passes: what a model says about given target sequences."""
from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from fairseq.modules import LearnedPositionalEmbedding
from torch import Tensor

from fairseq_earm.ebm.energy import TokenEnergies, last_step, log_mu, token_energies, widen
from fairseq_earm.errors import UsageError


# Logits held at once while sequences are scored: 128 MiB in float32.
MAX_LOGITS = 2**25


class SequenceScores(NamedTuple):
    """A model's log-probability and energy of whole sequences, in nats.

    Attributes:
        log_q: (R, T) log-probability of each token under the softmax, 0 where masked.
        log_mu: (R,) logsumexp at the last step, or one step after it: minus the residual energy (Eq. 4).
    """

    log_q: Tensor
    log_mu: Tensor


def full_logits(decoder, net_output: tuple) -> Tensor:
    """(R, T, V) logits of a decoder's output.

    An adaptive softmax has no such tensor: it says log p(x) = log p(cluster) + log p(x | cluster). Written as logits whose
    logsumexp is that of its head, softmax and free offset (Eq. 4) are exactly the head's; at least float32.

    Args:
        decoder: a fairseq decoder.
        net_output: what it returned; logits, or features for its adaptive softmax, come first.
    """
    softmax = getattr(decoder, "adaptive_softmax", None)
    if softmax is None:
        return net_output[0]
    features, shortlist = net_output[0].contiguous(), softmax.cutoff[0]  # a tied head looks at it as one list of steps
    head = widen(softmax.head(features).view(*features.shape[:-1], -1))
    clusters = [
        head[..., shortlist + number, None] + widen(tail(features)).log_softmax(-1) for number, tail in enumerate(softmax.tail)
    ]
    return torch.cat([head[..., :shortlist], *clusters], -1)


def last_logits(decoder, read: Tensor) -> Tensor:
    """(R, V) logits after all of the tokens read (R, T), by a decoder without an encoder; at least float32."""
    output = decoder(read)[0][:, -1:]
    return widen(full_logits(decoder, (output,))[:, 0])


def decoder_input(tokens: Tensor, start, *, extra_step: bool = False) -> Tensor:
    """Shift targets right behind the decoder's start token.

    Args:
        tokens: (R, T) right-padded targets.
        start: one token index for all rows, or (R,) of them.
        extra_step: keep the last token too, so that the decoder also takes the step after it: (R, T + 1).
    """
    first = torch.as_tensor(start, device=tokens.device).expand(tokens.size(0)).unsqueeze(1)
    return torch.cat([first, tokens if extra_step else tokens[:, :-1]], 1)


def start_tokens(net_input: dict, eos: int) -> Tensor:
    """(B,) first decoder input of each sentence: what the batch says, else end-of-sentence as fairseq does."""
    if net_input.get("prev_output_tokens") is not None:
        return net_input["prev_output_tokens"][:, 0]
    return torch.full_like(net_input["src_lengths"], eos)


def check_post_step(decoder, steps: int, *, flag: str = "--energy-step") -> None:
    """Refuse the step after a sentence that fills all learned positions; computed positions go on without end.

    Args:
        steps: most steps that the decoder takes, the one after the last token included.
        flag: the flag that asks for this step, for messages.
    Raises:
        UsageError: the decoder has fewer positions.
    """
    positions = getattr(decoder, "embed_positions", None)
    if isinstance(positions, LearnedPositionalEmbedding) and steps > positions.max_positions:
        raise UsageError(
            f"{flag} post: reads one step more than a sentence has, and the longest one fills all "
            f"{positions.max_positions} positions of the model; leave such sentences out of the data, write shorter "
            "translations (fairseq-generate --max-len-b), or use last"
        )


def post_tokens(tokens: Tensor) -> Tensor:
    """(R, T + 1) targets (R, T) and any index for the step after the last one."""
    return torch.cat([tokens, tokens[:, -1:]], 1)


def with_post_step(energies: TokenEnergies, mask: Tensor) -> tuple:
    """Token energies whose last step is the one after the last token.

    Nothing is predicted there, so its NLL is zero and its energy −logsumexp: target logit := logsumexp.

    Args:
        energies: (R, T + 1) of `post_tokens`, by a decoder fed with `decoder_input(tokens, start, extra_step=True)`.
        mask: (R, T) True on real tokens.
    Returns:
        TokenEnergies (R, T + 1) and their mask (R, T + 1), one step longer per row than `mask` where a row has any.
    """
    is_target = torch.cat([mask, mask.new_zeros(mask.size(0), 1)], 1)
    target_logit = torch.where(is_target, energies.target_logit, energies.logsumexp)
    after = (last_step(mask) + 1).unsqueeze(1)
    alive = is_target.scatter(1, after, mask.any(1, keepdim=True))
    return TokenEnergies(energies.logsumexp, target_logit), alive


@torch.no_grad()
def score_sequences(
    model, net_input: dict, tokens: Tensor, mask: Tensor, *, sources: Optional[Tensor] = None, energy_step: str = "last",
) -> SequenceScores:
    """Score target sequences of one batch of source sentences with a fairseq encoder-decoder model.

    The model is used in the mode it is in (put it in eval mode for evaluation).

    Args:
        model: an unwrapped encoder-decoder model.
        net_input: the batch's `net_input`; of its `prev_output_tokens` only the start token is used.
        tokens, mask: (R, T) right-padded targets with end-of-sentence, True on real tokens.
        sources: (R,) row of `net_input` that each target belongs to; by default target i belongs to source i.
        energy_step: "last" reads log μ at the last token's step, "post" one step after it.
    Raises:
        UsageError: the model has no position for the step after the longest target.
    """
    inputs = {k: v for k, v in net_input.items() if k != "prev_output_tokens"}
    encoder_out = model.encoder(**inputs)
    start = start_tokens(net_input, model.decoder.dictionary.eos())
    if sources is not None:
        encoder_out = model.encoder.reorder_encoder_out(encoder_out, sources)
        start = start[sources]
    post = energy_step == "post"
    if post:
        check_post_step(model.decoder, tokens.size(1) + 1)
    output = model.decoder(decoder_input(tokens, start, extra_step=post), encoder_out=encoder_out)
    logits = full_logits(model.decoder, output)
    if post:
        energies, alive = with_post_step(token_energies(logits, post_tokens(tokens)), mask)
    else:
        energies, alive = token_energies(logits, tokens), mask
    log_q = -energies.nll[:, : tokens.size(1)].masked_fill(~mask, 0.0)
    return SequenceScores(log_q, log_mu(energies.logsumexp, alive))
