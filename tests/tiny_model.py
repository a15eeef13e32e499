"""Untrained models on a handful of words, small enough to enumerate everything they can say."""
from __future__ import annotations

import itertools
from argparse import Namespace

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel, base_architecture

from fairseq_earm.sampling.scoring import decoder_input


def tiny_dictionary(words: int = 2) -> Dictionary:
    dictionary = Dictionary()
    for number in range(words):
        dictionary.add_symbol(f"w{number}")
    return dictionary


def tiny_model(
    words: int = 2, seed: int = 0, dropout: float = 0.0, max_target_positions: int = 64, learned_positions: bool = False,
    **settings,
) -> TransformerModel:
    """A one-layer transformer in float64 with logits far from uniform; `settings` are further flags of transformer."""
    dictionary = tiny_dictionary(words)
    args = Namespace(
        encoder_layers=1, decoder_layers=1, encoder_embed_dim=8, decoder_embed_dim=8, encoder_ffn_embed_dim=16,
        decoder_ffn_embed_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, dropout=dropout,
        max_source_positions=64, max_target_positions=max_target_positions, share_decoder_input_output_embed=False,
        decoder_learned_pos=learned_positions, **settings,
    )
    base_architecture(args)
    torch.manual_seed(seed)
    model = TransformerModel.build_model(args, Namespace(source_dictionary=dictionary, target_dictionary=dictionary))
    model.double()
    softmax = model.decoder.adaptive_softmax
    sharpen([model.decoder.output_projection.weight] if softmax is None else softmax.parameters())
    return model.eval()


def sharpen(weights) -> None:
    """Make weights four times as large, each once."""
    with torch.no_grad():
        for weight in {id(weight): weight for weight in weights}.values():
            weight.mul_(4.0)


def log_probs_of(decoder, output: tuple) -> torch.Tensor:
    """(..., V) log-probabilities in what a decoder returned, an adaptive softmax's by fairseq's own formula."""
    softmax = decoder.adaptive_softmax
    return output[0].log_softmax(-1) if softmax is None else softmax.get_log_prob(output[0], None)


def tiny_batch(model, lengths=(3, 2), seed: int = 1) -> dict:
    """`net_input` of left-padded random sources, without `prev_output_tokens`."""
    dictionary = model.encoder.dictionary
    generator = torch.Generator().manual_seed(seed)
    src_tokens = torch.full((len(lengths), max(lengths)), dictionary.pad())
    for row, length in enumerate(lengths):
        words = torch.randint(dictionary.nspecial, len(dictionary), (length - 1,), generator=generator)
        src_tokens[row, -length:] = torch.cat([words, torch.tensor([dictionary.eos()])])
    return {"src_tokens": src_tokens, "src_lengths": torch.tensor(lengths)}


def enumerate_targets(model, net_input: dict, source: int, length: int, transform=None) -> dict:
    """Every sequence that ends by end-of-sentence or is cut at `length` tokens → its exact log-probability.

    Padding is never said, and the rest renormalised. One full decoder pass per prefix: no cache, no batch.

    Args:
        transform: from a step's (V,) log-probabilities, −∞ for padding and not renormalised yet, to those after top-k
            or the like.
    """
    dictionary = model.decoder.dictionary
    eos, pad = dictionary.eos(), dictionary.pad()
    one = {key: value[source : source + 1] for key, value in net_input.items()}
    with torch.no_grad():
        encoder_out = model.encoder(one["src_tokens"], src_lengths=one["src_lengths"])
        complete, open_prefixes = {}, {(): 0.0}
        for _ in range(length):
            extended = {}
            for prefix, log_prob in open_prefixes.items():
                tokens = torch.tensor([[*prefix, pad]])
                log_probs = log_probs_of(model.decoder, model.decoder(decoder_input(tokens, eos), encoder_out=encoder_out))[0, -1]
                log_probs[pad] = -float("inf")
                log_probs = log_probs.log_softmax(-1) if transform is None else transform(log_probs)
                for token in itertools.chain(range(pad), range(pad + 1, len(dictionary))):
                    (complete if token == eos else extended)[prefix + (token,)] = log_prob + log_probs[token].item()
            open_prefixes = extended
        return {**complete, **open_prefixes}
