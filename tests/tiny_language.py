"""Untrained language models on a handful of words, and a little text with a language model trained on it."""
from __future__ import annotations

import itertools
import random
from argparse import Namespace
from types import SimpleNamespace
from typing import Optional

import torch
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from torch import Tensor

from tests.tiny_model import log_probs_of, sharpen, tiny_dictionary
from tests.tiny_translation import OPTIMISATION, command

ARCH = (
    "--arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 "
    "--share-decoder-input-output-embed --dropout 0.1 "
).split()
TEXT = ["--task", "language_modeling", "--sample-break-mode", "none", "--tokens-per-sample", 12]
# Flags of adaptive softmaxes for `tiny_language_model`s of three words or more.
ADAPTIVE = {"adaptive_softmax_cutoff": "3,5", "adaptive_softmax_factor": 2.0, "adaptive_softmax_dropout": 0.0}
TIED = {
    **ADAPTIVE, "adaptive_input": True, "adaptive_input_cutoff": "3,5", "adaptive_input_factor": 2.0,
    "tie_adaptive_weights": True, "tie_adaptive_proj": True,
}
SIZES = {"train": 300, "valid": 60, "test": 40}


def tiny_language_model(words: int = 2, seed: int = 0, max_positions: int = 64, **settings) -> TransformerLanguageModel:
    """A one-layer transformer in float64 with logits far from uniform; `settings` are further flags of transformer_lm."""
    dictionary = tiny_dictionary(words)
    args = Namespace(
        decoder_layers=1, decoder_embed_dim=8, decoder_ffn_embed_dim=16, decoder_attention_heads=2, dropout=0.0,
        tokens_per_sample=max_positions, max_target_positions=max_positions, **settings,
    )
    base_lm_architecture(args)
    torch.manual_seed(seed)
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = TransformerLanguageModel.build_model(args, task).double()
    decoder, softmax = model.decoder, model.decoder.adaptive_softmax
    sharpen([decoder.embed_tokens.weight, decoder.output_projection.weight] if softmax is None else softmax.parameters())
    return model.eval()


def enumerate_continuations(model, prefix: Tensor, length: int, first: Optional[int] = None) -> dict:
    """Every continuation of `length` tokens of one prefix (P,) → its exact log-probability.

    Padding is never said, and the rest renormalised. One full pass per prefix: no cache, no batch. `first` is what the
    decoder reads before the prefix, by default end-of-sentence.
    """
    dictionary = model.decoder.dictionary
    pad = dictionary.pad()
    first = dictionary.eos() if first is None else first
    found = {(): 0.0}
    for _ in range(length):
        extended = {}
        for continuation, log_prob in found.items():
            read = torch.tensor([[first, *prefix.tolist(), *continuation]])
            with torch.no_grad():
                log_probs = log_probs_of(model.decoder, model.decoder(read))[0, -1]
            log_probs[pad] = -float("inf")
            log_probs = log_probs.log_softmax(-1).tolist()
            for token in itertools.chain(range(pad), range(pad + 1, len(dictionary))):
                extended[continuation + (token,)] = log_prob + log_probs[token]
        found = extended
    return found


def sentence(rng: random.Random) -> str:
    """A word, some words each of which likes to repeat the one before, and the first word again."""
    words = [rng.choice("a b c d".split())]
    for _ in range(rng.randint(1, 5)):
        words.append(words[-1] if rng.random() < 0.5 else rng.choice("a b c d e f".split()))
    return " ".join([*words, words[0]])


def build_text(folder):
    """Binarised text, and a language model `base` trained on blocks of 12 tokens by stock commands."""
    rng = random.Random(1)
    for split, size in SIZES.items():
        (folder / f"{split}.txt").write_text("".join(sentence(rng) + "\n" for _ in range(size)))
    data = folder / "data"
    prefixes = [f"--{s}pref={folder / s}.txt" for s in SIZES]
    command("preprocess", "--only-source", *prefixes, "--destdir", data, "--workers", 1)
    save = ["--save-dir", folder / "base", "--seed", 1, "--criterion", "cross_entropy"]
    command("train", data, *TEXT, *ARCH, *OPTIMISATION, *save)
    return SimpleNamespace(folder=folder, data=data, base=folder / "base" / "checkpoint_last.pt")
