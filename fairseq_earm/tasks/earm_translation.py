"""Translation with scheduled sampling and reranking by the model's own energy, which loses no sentence in evaluation."""
from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_earm.reranking import EnergyReranker
from fairseq_earm.tasks.batching import ExactBatches
from fairseq_earm.tasks.checks import check_energy_flags
from fairseq_earm.tasks.scheduled_sampling import ScheduledSampling, ScheduledSamplingConfig


@dataclass
class EarmTranslationConfig(ScheduledSamplingConfig, TranslationConfig):
    """What `--task earm_translation` takes beside the flags of `translation`."""

    energy_rerank: bool = field(
        default=False,
        metadata={
            "help": "order candidates by (log q(x|source) + energy-weight * log mu(x)) / length^lenpen, log mu being the "
            "logsumexp of the logits at the last step; H- and D-lines then show this score in base 2, P-lines still log q"
        },
    )
    energy_weight: float = field(default=1.0, metadata={"help": "weight of log mu, 0 or more; 0 is the stock order"})
    energy_select: ChoiceEnum(["best", "resample"]) = field(
        default="best",
        metadata={
            "help": "best: sort candidates by score. resample: with --sampling, draw one of them with probability "
            "proportional to mu^energy-weight (Algorithm 1) and order the others by further draws, repeatable by --seed; "
            "with top-k, top-p or a temperature the weights are relative to that truncated proposal"
        },
    )
    energy_step: ChoiceEnum(["last", "post"]) = field(
        default="last",
        metadata={
            "help": "step at which log mu is read: last, the step of end-of-sentence; post, the one after it, for models "
            "trained with --earm-energy-steps post"
        },
    )


@register_task("earm_translation", dataclass=EarmTranslationConfig)
class EarmTranslationTask(ScheduledSampling, ExactBatches, TranslationTask):
    """fairseq's `translation` with energy reranking and scheduled sampling; its data and checkpoints are those of `translation`.

    Raises:
        UsageError: an energy weight that is negative or not finite; flags of scheduled sampling that cannot work.
    """

    def __init__(self, cfg: EarmTranslationConfig, src_dict, tgt_dict):
        super().__init__(cfg, src_dict, tgt_dict)
        check_energy_flags(cfg, cfg.energy_rerank, "--energy-rerank")

    def build_generator(self, models, args, *rest, **kwargs):
        """The stock generator, wrapped in an `EnergyReranker` under `--energy-rerank`."""
        generator = super().build_generator(models, args, *rest, **kwargs)
        if not self.cfg.energy_rerank:
            return generator
        return EnergyReranker(
            generator,
            models,
            weight=self.cfg.energy_weight,
            select=self.cfg.energy_select,
            energy_step=self.cfg.energy_step,
        )
