"""Language models: negatives are text that the model writes itself, where the data's text stands."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.sampling.family import ModelFamily, Passes, end_of_sentence
from fairseq_earm.sampling.isolation import isolated
from fairseq_earm.sampling.joint_forward import forward_with_negatives
from fairseq_earm.sampling.samples import Samples
from fairseq_earm.sampling.scheduled import keep_teacher_forced


class LanguageModelFamily(ModelFamily):
    """Negatives are continuations of each block's own first input token and the `prefix_length` tokens behind it.

    Where blocks are cut out of running text, a negative is as long as the data that it is held against, and
    end-of-sentence is a token like any other. Where each row is a sentence, both end by it.

    Args:
        dictionary: the task's.
        length: most tokens of a negative.
        prefix_length: tokens of the block that come before.
        sentences: True where each row is one sentence.
        loss_rows: steps whose logits are held at once; 0 for all of them.
        bf16: draw by products in bfloat16.
        dropout: the criterion's --earm-dropout.
    Raises:
        UsageError: no end-of-sentence in the dictionary.
    """

    without_effect = ("earm_max_len_a", "earm_max_len_b")

    def __init__(
        self, dictionary, length: int, *, prefix_length: int = 0, sentences: bool = False, loss_rows: int = 0, bf16: bool = False,
        dropout: str = "shared",
    ):
        self.pad = dictionary.pad()
        self.eos = end_of_sentence(dictionary)
        self.sampler = ContinuationSampler(dictionary, length, bf16=bf16)
        self.prefix_length = prefix_length
        self.sentences = sentences
        self.loss_rows = loss_rows
        self.bf16 = bf16
        self.dropout = dropout
        self.window = slice(prefix_length, prefix_length + length)

    def check(self, model) -> None:
        kind = type(model).__name__
        if hasattr(model, "encoder") or not isinstance(getattr(model, "decoder", None), FairseqIncrementalDecoder):
            raise UsageError(
                f"--task earm_language_modeling: E-ARM writes its negatives from left to right, and {kind} cannot; give a "
                "decoder-only model with incremental state, such as --arch transformer_lm"
            )
        positions = model.max_positions()
        if self.sentences and positions is not None and self.window.stop > positions:
            raise UsageError(
                f"--earm-negative-length {self.sampler.length}: with --earm-prefix-length {self.prefix_length} it exceeds the "
                f"{positions} positions of the model; give less"
            )
        super().check(model)

    def draw(self, model, sample, negatives) -> Samples:
        data = self.contrasted(sample["target"].ne(self.pad))
        length = self.sampler.length if self.sentences else data.size(1)
        with isolated(model, sample["net_input"]["src_tokens"]):
            samples = self.sampler.go_on(model, self._prefixes(sample), negatives, length=length, to_the_end=self.sentences)
        return self._cut(samples, data)

    def forward(self, model, sample, samples=None, *, energies=True) -> Passes:
        net_input, decoder = {**sample["net_input"], **self.decoder_flags()}, model.decoder

        def memory_of(rows) -> dict:
            return {"memory": decoder.select_memory(rows)} if hasattr(decoder, "select_memory") else {}

        def data_again(inner):
            rows = torch.arange(sample["target"].size(0), device=sample["target"].device)
            return inner.forward(**net_input, **memory_of(rows))

        def decode_negatives(encoder_out):
            read = torch.cat([self._prefixes(sample)[samples.sources], samples.tokens[:, :-1]], 1)
            return decoder(read, **memory_of(samples.sources), **self.decoder_flags())

        again = data_again if energies and self.dropout != "shared" else None
        with keep_teacher_forced():
            negatives = None if samples is None else decode_negatives
            passes = self.passes(decoder, forward_with_negatives(model, net_input, negatives, data_again=again))
        return passes if samples is None else passes._replace(negatives=passes.negatives.after(self.prefix_length))

    def contrasted(self, values: Tensor) -> Tensor:
        window = values[:, self.window]
        # A batch whose rows all end before the negatives begin keeps one step, which its mask leaves out.
        return F.pad(window, (0, 1)) if window.size(1) == 0 else window

    def _prefixes(self, sample) -> Tensor:
        """(B, prefix_length + 1) what the decoder reads before the first drawn token; a row that ends before reads anything."""
        tokens = sample["net_input"]["src_tokens"][:, : self.prefix_length + 1]
        missing = self.prefix_length + 1 - tokens.size(1)
        tokens = F.pad(tokens, (0, missing), value=self.pad)
        return tokens.masked_fill(tokens.eq(self.pad), self.eos)

    def _cut(self, samples: Samples, data: Tensor) -> Samples:
        """Leave of the drawn tokens those that stand against data (B, T'): no row whose data ends before them has any."""
        if self.sentences:
            ends = samples.tokens.eq(self.eos)
            alive = (ends.cumsum(1) - ends.long()).eq(0) & data[samples.sources, :1]
            truncated = alive.any(1) & ~(alive & ends).any(1)
            limits = torch.full_like(samples.sources, self.sampler.length)
        else:
            alive, truncated = data[samples.sources], samples.truncated
            limits = alive.sum(1)
        tokens, log_q = samples.tokens.masked_fill(~alive, self.pad), samples.log_q.masked_fill(~alive, 0.0)
        return samples._replace(tokens=tokens, mask=alive, log_q=log_q, truncated=truncated, limits=limits)
