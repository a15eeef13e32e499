"""Base models with an energy, as `residual.measure_sequence` asks for them: language models and translation models."""
from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor
from tqdm import tqdm

from fairseq_earm.ebm.energy import widen
from fairseq_earm.evaluation.residual import LastToken
from fairseq_earm.sampling.continuation import ContinuationSampler, score_continuations
from fairseq_earm.sampling.draw import without_padding
from fairseq_earm.sampling.layout import prefix_continuation, source_target
from fairseq_earm.sampling.scoring import MAX_LOGITS, decoder_input, full_logits, last_logits, score_sequences, start_tokens


class LanguageJoint:
    """A language model on sequences of one length, and an energy of whole sequences.

    An item is (P + T,) tokens without padding; the first P are the prefix. Padding has no probability.

    Args:
        base: a fairseq language model in eval mode.
        energies: (R, P + T) tokens → (R,) energies; None for the base alone.
        prefix_length: P.
        chunk: sequences drawn or scored at once. The samples depend on it.
    """

    def __init__(self, base, energies: Optional[Callable[[Tensor], Tensor]], prefix_length: int, *, chunk: int):
        self.base = base
        self.energies = energies
        self.prefix_length = prefix_length
        self.chunk = chunk
        self.dictionary = base.decoder.dictionary

    def base_log_probs(self, item: Tensor) -> Tensor:
        pad, eos = self.dictionary.pad(), self.dictionary.eos()
        return score_continuations(self.base, item.unsqueeze(0), self.prefix_length, pad=pad, eos=eos).squeeze(0)

    @torch.no_grad()
    def energy(self, item: Tensor) -> Tensor:
        return self.energies(item.unsqueeze(0)).squeeze(0)

    @torch.no_grad()
    def sampled_energies(self, item: Tensor, known: int, samples: int, seed: int) -> Tensor:
        given = item[: self.prefix_length + known].unsqueeze(0)
        sampler = ContinuationSampler(self.dictionary, item.numel() - given.size(1))
        generator = torch.Generator(device=item.device)
        generator.manual_seed(seed)
        energies = []
        for count in _progress(chunk_sizes(samples, self.chunk)):
            drawn = sampler(self.base, given, count, generator=generator)
            energies.append(self.energies(prefix_continuation(given, drawn.tokens)))
        return torch.cat(energies)

    @torch.no_grad()
    def last_token(self, item: Tensor) -> LastToken:
        logits = last_logits(self.base.decoder, decoder_input(item.unsqueeze(0), self.dictionary.eos()))[0]
        log_probs = without_padding(logits, self.dictionary.pad()).log_softmax(-1)
        tokens = torch.arange(log_probs.numel(), device=item.device)
        tokens = tokens[tokens != self.dictionary.pad()]
        return LastToken(log_probs[tokens], self._energies_by_end(item, tokens))

    def _energies_by_end(self, item: Tensor, tokens: Tensor) -> Tensor:
        """(V,) energies of the sequence with each of (V,) last tokens."""
        if isinstance(self.energies, OwnLanguageEnergies):  # known before the last token
            return self.energies(item.unsqueeze(0)).expand(tokens.numel())
        ends = tokens.unsqueeze(1).split(self.chunk)
        return torch.cat([self.energies(prefix_continuation(item[:-1].unsqueeze(0), end)) for end in ends])


class TranslationJoint:
    """An encoder-decoder model, and an energy of source sentences with their translations.

    An item is a fairseq batch of one sentence pair; the source is the prefix, and every token of the target counts,
    end-of-sentence included. Padding has no probability.

    Args:
        base: an encoder-decoder model in eval mode.
        energies: (net_input, (R, T) right-padded translations of its one source, their mask) → (R,) energies; None for the
            base alone.
        sampler: an `AncestralSampler`.
        chunk: translations drawn or scored at once. The samples depend on it.
    """

    def __init__(self, base, energies: Optional[Callable[[dict, Tensor, Tensor], Tensor]], sampler, *, chunk: int):
        self.base = base
        self.energies = energies
        self.sampler = sampler
        self.chunk = chunk
        self.pad = base.decoder.dictionary.pad()

    @torch.no_grad()
    def base_log_probs(self, item: dict) -> Tensor:
        target, inputs = item["target"], item["net_input"]
        encoder_out = self.base.encoder(src_tokens=inputs["src_tokens"], src_lengths=inputs["src_lengths"])
        read = decoder_input(target, start_tokens(inputs, self.base.decoder.dictionary.eos()))
        logits = full_logits(self.base.decoder, self.base.decoder(read, encoder_out=encoder_out))
        log_probs = without_padding(widen(logits), self.pad).log_softmax(-1)
        return log_probs.gather(-1, target.unsqueeze(-1)).flatten()

    @torch.no_grad()
    def energy(self, item: dict) -> Tensor:
        target = item["target"]
        return self.energies(item["net_input"], target, target.ne(self.pad)).squeeze(0)

    @torch.no_grad()
    def sampled_energies(self, item: dict, known: int, samples: int, seed: int) -> Tensor:
        if known:
            raise ValueError("translations end where they like: there is no estimate of their steps")
        inputs, energies = item["net_input"], []
        # This sampler draws from a stream seeded by the global state, which it restores.
        with torch.random.fork_rng():
            for number, count in enumerate(_progress(chunk_sizes(samples, self.chunk))):
                torch.manual_seed(seed + number)
                drawn = self.sampler(self.base, inputs, negatives=count)
                energies.append(self.energies(inputs, drawn.tokens, drawn.mask))
        return torch.cat(energies)

    def last_token(self, item: dict) -> LastToken:
        raise ValueError("translations end where they like: there is no last step")


def own_energies(model, energy_step: str = "last") -> Callable[[dict, Tensor, Tensor], Tensor]:
    """An E-ARM translation model's energies of translations of one source: −log μ (Wang et al., Eq. 4)."""

    def energies(net_input: dict, tokens: Tensor, mask: Tensor) -> Tensor:
        sources = torch.zeros(tokens.size(0), dtype=torch.long, device=tokens.device)
        return -score_sequences(model, net_input, tokens, mask, sources=sources, energy_step=energy_step).log_mu

    return energies


class OwnLanguageEnergies:
    """An E-ARM language model's energies of whole sequences: −log μ (Wang et al., Eq. 4), read at the last token's step.

    (R, L) tokens → (R,). The logsumexp is over the whole vocabulary, as it was trained; padding, which is never drawn,
    included.
    """

    def __init__(self, model):
        self.decoder = model.decoder

    def __call__(self, tokens: Tensor) -> Tensor:
        read = decoder_input(tokens, self.decoder.dictionary.eos())
        rows = max(1, MAX_LOGITS // (read.size(1) * len(self.decoder.dictionary)))
        return torch.cat([-last_logits(self.decoder, part).logsumexp(-1) for part in read.split(rows)])


def network_energies(network, pad: int, shift: int) -> Callable[[dict, Tensor, Tensor], Tensor]:
    """An energy network's energies of translations of one source, read source first; see `layout.source_target`."""
    longest = network.max_positions()

    def energies(net_input: dict, tokens: Tensor, mask: Tensor) -> Tensor:
        return network(source_target(net_input["src_tokens"], tokens, pad=pad, shift=shift, longest=longest))

    return energies


def _progress(chunks: list):
    """A bar below that of the sequences, where one of them takes long."""
    return tqdm(chunks, desc="samples", unit="batch", position=1, leave=False, delay=5, disable=None)


def chunk_sizes(total: int, chunk: int) -> list:
    """[chunk, ..., chunk, rest], adding up to `total`."""
    return [min(chunk, total - start) for start in range(0, total, chunk)]
