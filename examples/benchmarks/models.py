"""The models that the benchmarks run, with random weights, and batches of random words for them."""
from __future__ import annotations

import math
from argparse import Namespace
from typing import Dict, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import transformer_iwslt_de_en
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from timing import device
from torch import Tensor

from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.scoring import decoder_input

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
        length: of what is drawn from it, about and on average; by default it does not end.
    """
    # What is read of end-of-sentence, at the start, is not to change with what is written of it.
    args = Namespace(**SIZES[size], arch="transformer_iwslt_de_en", share_decoder_input_output_embed=False, dropout=0.3)
    transformer_iwslt_de_en(args)
    symbols = dictionary(vocabulary)
    model = TransformerModel.build_model(args, Namespace(source_dictionary=symbols, target_dictionary=symbols))
    end_after(model, length)
    return model.eval()


@torch.no_grad()
def end_after(model, length: float = math.inf) -> None:
    """Give end-of-sentence about the probability 1 / `length` at every step, or as good as none.

    All last states are shifted one way, and the output embedding of end-of-sentence is laid along it: to whoever runs it,
    this is a model like any other.
    """
    model.eval()
    embedding, eos = model.decoder.output_projection.weight, symbols_of(model).eos()
    along = embedding[eos] / embedding[eos].norm()
    last_norm = model.decoder.layer_norm or model.decoder.layers[-1].final_layer_norm
    last_norm.bias.copy_(8 * along)
    embedding[eos] = -3 * along
    if length < math.inf:
        states = _own_states(model)
        shares = (states @ along).unsqueeze(1), (states @ embedding.t()).logsumexp(1, keepdim=True)
        scales = torch.linspace(0, 4, 401)
        chances = torch.sigmoid(shares[0] * scales - shares[1]).mean(0)
        embedding[eos] = scales[int((chances - 1 / length).abs().argmin())] * along


def _own_states(model: TransformerModel) -> Tensor:
    """(N, d) last states of the decoder while it writes."""
    net_input = sources(model, 32, 20)
    drawn = AncestralSampler(symbols_of(model), max_len_a=0, max_len_b=20)(model, net_input)
    read = decoder_input(drawn.tokens, symbols_of(model).eos())
    return model(**net_input, prev_output_tokens=read, features_only=True)[0].flatten(0, 1)


def language_model(size: str, vocabulary: int) -> TransformerLanguageModel:
    """A `transformer_lm` of 2 layers of dimension 128 ("small"), or 6 of dimension 512 ("base"), in eval mode."""
    layers, dim, ffn, heads = {"small": (2, 128, 512, 4), "base": (6, 512, 2048, 8)}[size]
    args = Namespace(
        decoder_layers=layers, decoder_embed_dim=dim, decoder_ffn_embed_dim=ffn, decoder_attention_heads=heads,
        share_decoder_input_output_embed=True, tokens_per_sample=512,
    )
    base_lm_architecture(args)
    symbols = dictionary(vocabulary)
    model = TransformerLanguageModel.build_model(args, Namespace(source_dictionary=symbols, target_dictionary=symbols))
    end_after(model)
    return model.eval()


def symbols_of(model) -> Dictionary:
    """What a model writes with."""
    return model.decoder.dictionary


def trained(checkpoint: str, data: str) -> Tuple[TransformerModel, object, object]:
    """A transformer for translation as `fairseq-train` left it, its configuration and its task; `data` holds its text."""
    [model], cfg, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], arg_overrides={"data": data})
    return model.eval(), cfg, task


def sources(model: TransformerModel, rows: int, length: int, seed: int = 1) -> dict:
    """`net_input` of random source sentences of length/2 to `length` tokens, the longest ones among them, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(length // 2, 2), length + 1, (rows,), generator=generator)
    lengths[0] = length
    tokens = _sentences(model.encoder.dictionary, lengths, generator)
    where = next(model.parameters()).device
    return {"src_tokens": tokens.to(where), "src_lengths": lengths.to(where)}


def parallel_batch(symbols: Dictionary, tokens: int, length: int, seed: int = 1) -> dict:
    """A batch of random sentences, source and target of one length, about so many tokens of each; 3/4 to 5/4 of `length`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(3 * length // 4, 2), 5 * length // 4 + 1, (max(tokens // length, 1),), generator=generator)
    source, target = (_sentences(symbols, lengths, generator) for _ in range(2))
    starts = torch.full((len(target), 1), symbols.eos())
    previous = torch.cat([starts, target[:, :-1].masked_fill(target[:, :-1] == symbols.eos(), symbols.pad())], 1)
    net_input = {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": previous}
    total = int(lengths.sum())
    return {"id": torch.arange(len(target)), "nsentences": len(target), "ntokens": total, "net_input": net_input, "target": target}


def prefixes(symbols: Dictionary, rows: int, length: int) -> Tensor:
    """(rows, length) random words for a language model to go on from."""
    return torch.randint(symbols.nspecial, len(symbols), (rows, length), device=device())


def real_batch(task, split: str, **limit: int) -> dict:
    """A batch of a task's data, the one of middling length; `limit` is max_tokens or max_sentences."""
    task.cfg.left_pad_source = False  # as all engines take it
    task.load_dataset(split)
    batches = task.get_batch_iterator(task.dataset(split), max_positions=task.max_positions(), **limit)
    batches = list(batches.next_epoch_itr(shuffle=False))
    return batches[len(batches) // 2]


def real_sources(task, rows: int) -> dict:
    """`net_input` of the sources of such a batch of the validation split."""
    net_input = real_batch(task, "valid", max_sentences=rows)["net_input"]
    return {key: net_input[key].to(device()) for key in ("src_tokens", "src_lengths")}


def _sentences(symbols: Dictionary, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """(R, longest) random words that end by end-of-sentence, padded on the right."""
    size = (lengths.numel(), int(lengths.max()))
    tokens = torch.randint(symbols.nspecial, len(symbols), size, generator=generator)
    tokens[torch.arange(size[0]), lengths - 1] = symbols.eos()
    return tokens.masked_fill(torch.arange(size[1]) >= lengths.unsqueeze(1), symbols.pad())
