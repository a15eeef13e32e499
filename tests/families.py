"""One small network of each family that E-ARM trains, with a batch, and what it says by definition."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Callable, List, NamedTuple, Optional

import torch

from fairseq_earm.criterions.earm_cross_entropy import EarmCrossEntropyCriterion
from fairseq_earm.models.carried_memory import CarriedMemory
from fairseq_earm.models.transformer_xl import TransformerXLConfig, TransformerXLLanguageModel
from fairseq_earm.sampling.encoder_decoder import EncoderDecoderFamily
from fairseq_earm.sampling.images import ImageFamily
from fairseq_earm.sampling.language_model import LanguageModelFamily
from tests.criterions.stubs import Task, config
from tests.oracles.network import Network, round_probabilities
from tests.tiny_images import Levels, tiny_pixel_model
from tests.tiny_language import tiny_language_model
from tests.tiny_model import tiny_batch, tiny_dictionary, tiny_model


class Family(NamedTuple):
    """A network in training mode, a batch, and an enumerator of what the network can say.

    Attributes:
        model: float64, without dropout; its forward's probabilities are rounded, if wanted. Pixel models draw past it.
        sample: the batch.
        build: criterion's flags → `ModelFamily`.
        dictionary: the target's.
        network: the oracle; one source for each row of the batch.
        data: each row's tokens that negatives are held against.
        parts: denominator of the probabilities.
        steps: the kinds of energy steps that the family has.
        normalizers: whose negatives a normaliser may be of.
    """

    model: torch.nn.Module
    sample: dict
    build: Callable
    dictionary: object
    network: Network
    data: List[tuple]
    parts: int
    steps: tuple = ("all", "last")
    normalizers: tuple = ("batch", "source")

    def criterion(self, **flags) -> EarmCrossEntropyCriterion:
        task = Task(self.dictionary)
        task.build_model_family = self.build
        return EarmCrossEntropyCriterion(task, config(**flags))


def encoder_decoder(rounded: bool = True) -> Family:
    model = tiny_model(words=1)
    eos, pad = model.decoder.dictionary.eos(), model.decoder.dictionary.pad()
    tokens, parts, length = [eos, 3, 4], 4, 3
    if rounded:
        round_probabilities(model.decoder, tokens, parts)
    net_input = tiny_batch(model, lengths=(3, 2, 4))
    data = [(4, 3, eos), (eos,), (3, eos)]
    target = torch.tensor([[*row, *[pad] * (length - len(row))] for row in data])
    net_input["prev_output_tokens"] = torch.cat([torch.full((3, 1), eos), target[:, :-1]], 1)

    def logits(source, prefix):
        one = {key: net_input[key][source : source + 1] for key in ("src_tokens", "src_lengths")}
        read = torch.tensor([[eos, *prefix]])
        return model.decoder(read, encoder_out=model.encoder(**one))[0][0, -1]

    task = Task(model.decoder.dictionary)
    return Family(
        model.train(), _batch(net_input, target, pad), lambda cfg: EncoderDecoderFamily(cfg, task), model.decoder.dictionary,
        Network(logits, tokens, length, 3, eos), data, parts, ("all", "last", "post"),
    )


def language_model(model=None, prefix_length: int = 1, rounded: bool = True) -> Family:
    model = tiny_language_model(words=1) if model is None else model
    eos, pad = model.decoder.dictionary.eos(), model.decoder.dictionary.pad()
    tokens, parts, length = [eos, 3, 4], 4, 2
    if rounded:
        round_probabilities(model.decoder, tokens, parts)
    blocks = torch.tensor([[4, 3, 3, eos, 4], [eos, 4, eos, 3, 3], [3, eos, 4, 4, 3]])
    net_input = {"src_tokens": blocks[:, :-1], "src_lengths": torch.full((3,), 4)}
    given = blocks[:, : prefix_length + 1].tolist()

    def logits(source, prefix):
        memory = {"memory": model.decoder.select_memory(torch.tensor([source]))} if hasattr(model.decoder, "select_memory") else {}
        return model.decoder(torch.tensor([[*given[source], *prefix]]), **memory)[0][0, -1]

    data = [tuple(row[prefix_length + 1 :][:length]) for row in blocks.tolist()]
    return Family(
        model.train(), _batch(net_input, blocks[:, 1:].contiguous(), pad),
        lambda cfg: LanguageModelFamily(
            model.decoder.dictionary, length, prefix_length=prefix_length, loss_rows=cfg.earm_loss_rows, bf16=cfg.earm_sampling_bf16,
            dropout=cfg.earm_dropout,
        ),
        model.decoder.dictionary, Network(logits, tokens, length, 3), data, parts,
    )


def transformer_xl(**flags) -> Family:
    """A language model in the middle of a text: what came before is in its memory."""
    model = tiny_transformer_xl()
    memory = model.decoder.carried = CarriedMemory()
    for step, earlier in enumerate(([[4, 3], [3, 3], [4, 2]], [[3, 4, 4], [2, 3, 4], [4, 4, 3]])):
        memory.begin(torch.arange(3) * 10 + step)
        model.decoder(torch.tensor(earlier))
    memory.begin(torch.arange(3) * 10 + 2)
    assert memory.read is not None
    return language_model(model, **flags)


def tiny_transformer_xl(words: int = 1) -> TransformerXLLanguageModel:
    dictionary = tiny_dictionary(words)
    sizes = {"decoder_layers": 2, "decoder_embed_dim": 8, "decoder_ffn_embed_dim": 12, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = TransformerXLLanguageModel.build_model(TransformerXLConfig(**sizes, dropout=0.0, mem_len=4), task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    return model.double()


def images(name: str = "gated_pixel_cnn", rounded: bool = True) -> Family:
    model = tiny_pixel_model(name, shape=(2, 2, 1), levels=2)
    parts, length = 4, 4
    if rounded:
        round_probabilities(model.decoder, [0, 1], parts)
    pixels = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]])
    net_input = {"src_tokens": pixels, "src_lengths": torch.full((2,), length)}

    def logits(source, prefix):
        image = torch.tensor([[*prefix, *[0] * (length - len(prefix))]])
        return model.decoder(image)[0][0, len(prefix)]

    return Family(
        model.train(), _batch(net_input, pixels, pad=2), ImageFamily, Levels(2), Network(logits, [0, 1], length, 2),
        [tuple(row) for row in pixels.tolist()], parts, normalizers=("batch",),
    )


def _batch(net_input, target, pad) -> dict:
    return {
        "id": torch.arange(target.size(0)), "net_input": net_input, "target": target, "nsentences": target.size(0),
        "ntokens": int(target.ne(pad).sum()),
    }


FAMILIES = {
    "encoder-decoder": encoder_decoder, "language model": language_model, "transformer_xl": transformer_xl,
    "pixel_cnn": lambda **flags: images("pixel_cnn", **flags), "gated_pixel_cnn": lambda **flags: images(**flags),
}
