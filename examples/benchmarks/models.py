"""The models that the benchmarks run, with random weights, and batches of random words for them."""
from __future__ import annotations

import math
from argparse import Namespace
from typing import Dict

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import transformer_iwslt_de_en
from torch import Tensor

SMALL = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_embed_dim": 128,
    "decoder_embed_dim": 128, "encoder_ffn_embed_dim": 512, "decoder_ffn_embed_dim": 512,
}
SIZES: Dict[str, dict] = {"iwslt": {}, "small": SMALL}


def dictionary(vocabulary: int) -> Dictionary:
    """Of so many symbols, the special ones included."""
    made = Dictionary()
    for number in range(vocabulary - len(made)):
        made.add_symbol(f"w{number}")
    return made


def translation_model(size: str, vocabulary: int, *, length: float = math.inf) -> TransformerModel:
    """`transformer_iwslt_de_en` ("iwslt"), or 2 + 2 layers of dimension 128 ("small"), in eval mode.

    Args:
        length: of what is drawn from it, about and on average: at every step end-of-sentence has about the same
            probability, 1 / `length`; by default as good as none.
    """
    args = Namespace(**SIZES[size], arch="transformer_iwslt_de_en", share_decoder_input_output_embed=True, dropout=0.3)
    transformer_iwslt_de_en(args)
    symbols = dictionary(vocabulary)
    model = TransformerModel.build_model(args, Namespace(source_dictionary=symbols, target_dictionary=symbols))
    _end_after(model, length)
    return model.eval()


@torch.no_grad()
def _end_after(model: TransformerModel, length: float) -> None:
    """Shift all last states one way, and lay the embedding of end-of-sentence along it; no engine sees a difference."""
    embedding, eos = model.decoder.output_projection.weight, model.decoder.dictionary.eos()
    vocabulary, dim = embedding.shape
    shift = 8 * embedding[eos] / embedding[eos].norm()
    model.decoder.layers[-1].final_layer_norm.bias.copy_(shift)
    # The others' logits are close to normal: of variance 1 from step to step, and of 8²/d from token to token.
    others = math.log(vocabulary) + (1 + 8**2 / dim) / 2
    logit = others - math.log(length - 1) if length < math.inf else -20.0
    embedding[eos] = shift * logit / shift.square().sum()


def trained_model(checkpoint: str, data: str) -> TransformerModel:
    """A transformer for translation as `fairseq-train` left it, in eval mode; `data` holds its dictionaries."""
    [model], _, _ = checkpoint_utils.load_model_ensemble_and_task([checkpoint], arg_overrides={"data": data})
    return model.eval()


def sources(model: TransformerModel, rows: int, length: int, seed: int = 1) -> dict:
    """`net_input` of random source sentences of length/2 to `length` tokens, the longest ones among them, padded on the right."""
    symbols = model.encoder.dictionary
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(length // 2, 2), length + 1, (rows,), generator=generator)
    lengths[0] = length
    tokens = random_sentences(symbols, lengths, generator)
    where = next(model.parameters()).device
    return {"src_tokens": tokens.to(where), "src_lengths": lengths.to(where)}


def random_sentences(symbols: Dictionary, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """(R, longest) random words that end by end-of-sentence, padded on the right."""
    size = (lengths.numel(), int(lengths.max()))
    tokens = torch.randint(symbols.nspecial, len(symbols), size, generator=generator)
    tokens[torch.arange(size[0]), lengths - 1] = symbols.eos()
    return tokens.masked_fill(torch.arange(size[1]) >= lengths.unsqueeze(1), symbols.pad())
