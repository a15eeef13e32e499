"""Who else samples from the same model: fairseq's generator, CTranslate2 and Hugging Face's `generate`, where they are installed.

Each is made from a transformer of fairseq and a batch of source sentences, and draws one translation for each row of the
batch whenever it is called; the number of tokens drawn is returned.
"""
from __future__ import annotations

import importlib.util
import math
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Callable, List

import torch
from fairseq import search
from fairseq.sequence_generator import SequenceGenerator

Draw = Callable[[], int]


def installed(library: str) -> bool:
    """Whether there is such a module."""
    return importlib.util.find_spec(library) is not None


def fairseqs_generator(model, net_input: dict, longest: int) -> Draw:
    """`SequenceGenerator` with `Sampling`; the end-of-sentence that it forces is the last of `longest` tokens."""
    symbols = model.decoder.dictionary
    generator = SequenceGenerator(
        [model], symbols, beam_size=1, max_len_a=0, max_len_b=longest - 1, min_len=0,
        search_strategy=search.Sampling(symbols),
    )

    def draw() -> int:
        found = generator.generate([model], {"net_input": net_input})
        return sum(len(hypotheses[0]["tokens"]) for hypotheses in found)

    return draw


def ctranslate2s(model, net_input: dict, longest: int, *, threads: int) -> Draw:
    """CTranslate2's random sampling, on the same device and in the same precision."""
    there = translator(model, threads=threads, device=net_input["src_tokens"].device.type)
    words = written(model.encoder.dictionary, net_input["src_tokens"])

    def draw() -> int:
        found = there.translate_batch(words, beam_size=1, sampling_topk=0, max_decoding_length=longest, min_decoding_length=0)
        lengths = [len(result.hypotheses[0]) for result in found]
        return sum(length + (length < longest) for length in lengths)  # end-of-sentence is not among them

    return draw


def translator(model, *, threads: int, device: str):
    """CTranslate2's engine with the weights of a transformer of fairseq."""
    import ctranslate2

    precision = str(next(model.parameters()).dtype).replace("torch.", "")
    with tempfile.TemporaryDirectory() as folder:
        _convert(model, Path(folder))
        return ctranslate2.Translator(
            str(Path(folder) / "converted"), device=device, compute_type=precision, inter_threads=1, intra_threads=threads
        )


def written(symbols, tokens) -> List[List[str]]:
    """The words of padded rows, without end-of-sentence."""
    special = {symbols.pad(), symbols.eos()}
    return [[symbols[token] for token in row if token not in special] for row in tokens.tolist()]


def _convert(model, folder: Path) -> None:
    """Write what CTranslate2's converter reads of a training run, and convert it."""
    from ctranslate2.converters import FairseqConverter

    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in vars(getattr(model.cfg, side)).items()}
    rest = {name: value for name, value in vars(model.cfg).items() if not hasattr(value, "__dict__")}
    args = Namespace(**{**rest, **sides, "task": "translation", "arch": "transformer"})
    for language, symbols in (("src", model.encoder.dictionary), ("tgt", model.decoder.dictionary)):
        symbols.save(str(folder / f"dict.{language}.txt"))
    state = {name: value.float().cpu() for name, value in model.state_dict().items()}
    torch.save({"args": args, "model": state}, folder / "checkpoint.pt")
    FairseqConverter(str(folder / "checkpoint.pt"), str(folder), "src", "tgt").convert(str(folder / "converted"))


def is_marian(model) -> bool:
    """Whether MarianMT can hold these weights: norms after each block and nowhere else, positions not learned."""
    sides = (model.encoder, model.decoder)
    return not any(side.layer_norm or side.layernorm_embedding or hasattr(side.embed_positions, "weight") for side in sides)


def hugging_faces_generate(model, net_input: dict, longest: int) -> Draw:
    """`generate(do_sample=True, top_k=0)` of a MarianMT model with the same weights."""
    marian = marian_model(model)
    tokens = net_input["src_tokens"]
    pad, start = marian.config.pad_token_id, 1

    def draw() -> int:
        found = marian.generate(
            tokens, attention_mask=tokens.ne(pad).long(), do_sample=True, top_k=0, num_beams=1, max_new_tokens=longest,
        )
        return int(found[:, start:].ne(pad).sum())

    return draw


def marian_model(model):
    """Hugging Face's MarianMT with the weights of a transformer of fairseq: post-norm, sinusoidal positions."""
    from transformers import MarianConfig, MarianMTModel

    encoder, decoder = model.encoder, model.decoder
    symbols, first, other = decoder.dictionary, encoder.layers[0], decoder.layers[0]
    config = MarianConfig(
        vocab_size=len(encoder.dictionary), decoder_vocab_size=len(symbols), d_model=first.self_attn.embed_dim,
        encoder_layers=len(encoder.layers), decoder_layers=len(decoder.layers), share_encoder_decoder_embeddings=False,
        tie_word_embeddings=decoder.share_input_output_embed,
        encoder_attention_heads=first.self_attn.num_heads, decoder_attention_heads=other.self_attn.num_heads,
        encoder_ffn_dim=first.fc1.out_features, decoder_ffn_dim=other.fc1.out_features, activation_function="relu",
        scale_embedding=True, max_position_embeddings=512, pad_token_id=symbols.pad(), eos_token_id=symbols.eos(),
        decoder_start_token_id=symbols.eos(), bos_token_id=symbols.bos(), forced_eos_token_id=None,
    )
    marian = MarianMTModel(config)
    known = marian.state_dict()
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items() if f"model.{name}" in known}
    for side in ("encoder", "decoder"):
        positions = getattr(model, side).embed_positions
        weights[f"model.{side}.embed_positions.weight"] = _positions(positions, config.max_position_embeddings)
    weights["lm_head.weight"] = decoder.output_projection.weight
    weights["final_logits_bias"] = torch.zeros(1, len(symbols)).index_fill(1, torch.tensor([symbols.pad()]), -math.inf)
    marian.load_state_dict(weights)
    return marian.to(decoder.output_projection.weight).eval()


def _positions(module, count: int):
    """(count, d) embeddings of the positions from the first one on, which fairseq counts from padding + 1."""
    return module.get_embedding(count + module.padding_idx + 1, module.embedding_dim, module.padding_idx)[module.padding_idx + 1 :]
