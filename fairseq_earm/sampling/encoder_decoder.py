"""Encoder-decoder models: translation, and whatever else turns a source into a target."""
from __future__ import annotations

from fairseq.models.nat import FairseqNATModel
from torch import Tensor

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling import build_sampler
from fairseq_earm.sampling.family import ModelFamily, Passes, end_of_sentence
from fairseq_earm.sampling.joint_forward import forward_with_negatives, unwrapped
from fairseq_earm.sampling.samples import Samples
from fairseq_earm.sampling.scheduled import keep_teacher_forced
from fairseq_earm.sampling.scoring import check_post_step, decoder_input, start_tokens


class EncoderDecoderFamily(ModelFamily):
    """Negatives answer the batch's own sources, and share their encoder output.

    Args:
        cfg: the criterion's flags.
        task: a task whose batches hold source and target.
    Raises:
        UsageError: a task or dictionary that cannot serve.
    """

    def __init__(self, cfg, task):
        if getattr(getattr(task, "cfg", None), "left_pad_target", False):
            raise UsageError("--left-pad-target True: E-ARM counts steps from the left; leave the flag out")
        self.eos = end_of_sentence(task.target_dictionary)
        _check_max_length(cfg, task)
        _check_topk(cfg, task.target_dictionary)
        self.given = max(cfg.ignore_prefix_size, 0)
        self.post = cfg.earm_energy_steps == "post"
        self.loss_rows = cfg.earm_loss_rows
        self.bf16 = cfg.earm_sampling_bf16
        self.dropout = str(cfg.earm_dropout)
        self.sampler = build_sampler(cfg, task.target_dictionary)

    def check(self, model) -> None:
        if not hasattr(model, "encoder") or not hasattr(model, "decoder"):
            raise UsageError(
                f"--criterion earm_cross_entropy: this task's models are encoder-decoder models, and {type(model).__name__} is "
                "none; for language models there is --task earm_language_modeling, for images earm_image_modeling"
            )
        kind = type(unwrapped(model))
        if issubclass(kind, FairseqNATModel):
            raise UsageError(
                f"--criterion earm_cross_entropy: E-ARM writes its negatives from left to right, and {kind.__name__} cannot; give an "
                "autoregressive model, such as --arch transformer"
            )
        super().check(model)

    def draw(self, model, sample, negatives) -> Samples:
        prefix = sample["target"][:, : self.given] if self.given else None
        samples = self.sampler(model, sample["net_input"], negatives, prefix)
        return samples if prefix is None else _with_data(samples, sample["target"][:, self.given :].ne(model.decoder.dictionary.pad()))

    def forward(self, model, sample, samples=None, *, energies=True) -> Passes:
        net_input, encoder, decoder = self._net_input(model, sample), model.encoder, model.decoder
        again = (lambda inner: inner.forward(**net_input)) if energies and self.dropout != "shared" else None

        def decode_negatives(encoder_out):
            starts = start_tokens(sample["net_input"], self.eos)[samples.sources]
            read = decoder_input(samples.tokens, starts, extra_step=self.post)
            encoder_out = encoder.reorder_encoder_out(encoder_out, samples.sources)
            return decoder(read, encoder_out=encoder_out, **self.decoder_flags())

        with keep_teacher_forced():
            negatives = None if samples is None else decode_negatives
            return self.passes(decoder, forward_with_negatives(model, net_input, negatives, data_again=again))

    def _net_input(self, model, sample) -> dict:
        net_input = {**sample["net_input"], **self.decoder_flags()}
        if not self.post:
            return net_input
        check_post_step(model.decoder, sample["target"].size(1) + 1, flag="--earm-energy-steps")
        starts = start_tokens(sample["net_input"], self.eos)
        return {**net_input, "prev_output_tokens": decoder_input(sample["target"], starts, extra_step=True)}


def _with_data(samples: Samples, data: Tensor) -> Samples:
    """Without what was drawn for rows that have no data (B, T') behind what is given: it stands against nothing."""
    alive = data.any(1)[samples.sources]
    mask = samples.mask & alive.unsqueeze(1)
    return samples._replace(mask=mask, log_q=samples.log_q.masked_fill(~mask, 0.0), truncated=samples.truncated & alive)


def _check_topk(cfg, dictionary) -> None:
    if cfg.earm_sampling_topk > len(dictionary):
        raise UsageError(
            f"--earm-sampling-topk {cfg.earm_sampling_topk}: the target dictionary has {len(dictionary)} symbols; give at most as many"
        )


def _check_max_length(cfg, task) -> None:
    positions = task.max_positions()
    positions = positions[1] if isinstance(positions, (tuple, list)) else positions
    # Some tasks have one number per language pair.
    if isinstance(positions, (int, float)) and cfg.earm_max_len_b >= positions:
        raise UsageError(
            f"--earm-max-len-b {cfg.earm_max_len_b}: negatives would exceed the model's {positions} target positions; give less"
        )
