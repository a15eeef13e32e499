"""Task `earm_language_modeling`: fairseq's `language_modeling` with what E-ARM needs."""
from dataclasses import dataclass, field

from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.language_model import LanguageModelFamily
from fairseq_earm.tasks.batching import ExactBatches
from fairseq_earm.tasks.scheduled_sampling import ScheduledSampling, ScheduledSamplingConfig
from fairseq_earm.tasks.truncated_bptt import TruncatedBptt, TruncatedBpttConfig


@dataclass
class EarmLanguageModelingConfig(ScheduledSamplingConfig, TruncatedBpttConfig, LanguageModelingConfig):
    """What `--task earm_language_modeling` takes beside the flags of `language_modeling`."""

    earm_negative_length: int = field(
        default=50, metadata={"help": "tokens of a negative, held against as many of the block; fewer where the block is shorter"}
    )
    earm_prefix_length: int = field(
        default=0, metadata={"help": "tokens of the block that negatives continue; 0: they begin where the block begins"}
    )


@register_task("earm_language_modeling", dataclass=EarmLanguageModelingConfig)
class EarmLanguageModelingTask(ScheduledSampling, TruncatedBptt, ExactBatches, LanguageModelingTask):
    """fairseq's `language_modeling`; its flags, data and checkpoints are those.

    Raises:
        UsageError: lengths that leave no negative, or targets other than the next token.
    """

    def __init__(self, args, dictionary, output_dictionary=None, targets=None):
        super().__init__(args, dictionary, output_dictionary, targets)
        self.cfg = args
        if self.targets != ["future"]:
            raise UsageError("--task earm_language_modeling predicts the next token: leave --self-target and --past-target out")
        _check_lengths(args)

    def build_model_family(self, cfg) -> LanguageModelFamily:
        """What `earm_cross_entropy` asks for.

        Raises:
            UsageError: flags of the criterion that language models have no use for.
        """
        if cfg.earm_energy_steps == "post":
            raise UsageError("--earm-energy-steps post: text has no last step to come after; use all or last")
        if cfg.earm_sampler != "ancestral":
            raise UsageError(f"--earm-sampler {cfg.earm_sampler}: language models have the ancestral one alone; leave the flag out")
        if cfg.ignore_prefix_size > self.cfg.earm_prefix_length:
            raise UsageError(
                f"--ignore-prefix-size {cfg.ignore_prefix_size}: negatives would be held against tokens that are ignored; give "
                f"--earm-prefix-length {cfg.ignore_prefix_size} as well"
            )
        if self.cfg.add_bos_token and self.cfg.earm_prefix_length == 0:
            raise UsageError(
                "--add-bos-token: a block then begins with two tokens that are given; give --earm-prefix-length 1 or more"
            )
        return LanguageModelFamily(
            self.target_dictionary,
            self.cfg.earm_negative_length,
            prefix_length=self.cfg.earm_prefix_length,
            sentences=self.cfg.sample_break_mode == "eos",
            loss_rows=cfg.earm_loss_rows,
            bf16=cfg.earm_sampling_bf16,
            dropout=str(cfg.earm_dropout),
        )


def _check_lengths(cfg) -> None:
    if cfg.earm_negative_length < 1:
        raise UsageError(f"--earm-negative-length {cfg.earm_negative_length}: give at least 1")
    if cfg.earm_prefix_length < 0:
        raise UsageError(f"--earm-prefix-length {cfg.earm_prefix_length}: give at least 0")
    if cfg.sample_break_mode != "eos" and cfg.earm_prefix_length >= cfg.tokens_per_sample:
        raise UsageError(
            f"--earm-prefix-length {cfg.earm_prefix_length}: leaves nothing of --tokens-per-sample {cfg.tokens_per_sample} to "
            "hold negatives against; give a shorter prefix or longer blocks"
        )
