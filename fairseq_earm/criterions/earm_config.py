"""The flags of `earm_cross_entropy` and what they may be set to."""
import math
from dataclasses import dataclass, field

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterionConfig
from fairseq.dataclass import ChoiceEnum
from omegaconf import II

from fairseq_earm.ebm.earm import ENERGY_STEPS, NORMALIZERS
from fairseq_earm.errors import UsageError

SAMPLERS = ("ancestral", "generator")


@dataclass
class EarmCrossEntropyConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """What `--criterion earm_cross_entropy` takes beside the stock criterion's flags."""

    earm_weight: float = field(
        default=0.05, metadata={"help": "λ, weight of the E-ARM loss beside cross-entropy; 0 is cross-entropy alone"}
    )
    earm_start_epoch: int = field(default=15, metadata={"help": "first epoch (counted from 1) that uses E-ARM"})
    earm_start_update: int = field(
        default=-1, metadata={"help": "first update that uses E-ARM; takes the place of --earm-start-epoch when set"}
    )
    earm_warmup_updates: int = field(
        default=0, metadata={"help": "updates over which λ grows linearly to --earm-weight, from E-ARM's start"}
    )
    earm_recent_tokens: int = field(
        default=2, metadata={"help": "tokens of history that E-ARM's gradient reaches; 0: none, -1: all"}
    )
    earm_energy_steps: ChoiceEnum(ENERGY_STEPS) = field(
        default="all",
        metadata={"help": "steps that carry an energy: all (the paper), the last, or the one after end-of-sentence"},
    )
    earm_smooth_history: bool = field(
        default=False, metadata={"help": "the data's history terms take label-smoothed NLL"}
    )
    earm_negatives: int = field(default=1, metadata={"help": "sequences sampled from the model per source sentence"})
    earm_normalizer: ChoiceEnum(NORMALIZERS) = field(
        default="batch", metadata={"help": "importance weights are normalised over the batch of all workers or over each source's negatives"}
    )
    earm_normalizer_ema: float = field(
        default=0.0, metadata={"help": "weight of the past in a moving normaliser per step; 0: this batch only"}
    )
    earm_variance_reduction: ChoiceEnum(["none", "rao-blackwell"]) = field(
        default="rao-blackwell",
        metadata={
            "help": "rao-blackwell: exact expectation over each negative's current token, about 10 percent less noise for "
            "nothing; --earm-energy-steps last and post leave none to take and ignore it"
        },
    )
    earm_max_len_a: float = field(
        default=1.5, metadata={"help": "negatives have at most a·(source length) + b tokens: a"}
    )
    earm_max_len_b: int = field(default=10, metadata={"help": "negatives have at most a·(source length) + b tokens: b"})
    earm_sampler: ChoiceEnum(SAMPLERS) = field(
        default="ancestral", metadata={"help": "the model's own softmax, or fairseq's SequenceGenerator with its options"}
    )
    earm_sampling_topk: int = field(default=-1, metadata={"help": "--earm-sampler generator: sample among the k likeliest"})
    earm_sampling_topp: float = field(
        default=-1.0, metadata={"help": "--earm-sampler generator: sample among the smallest set with probability p"}
    )
    earm_sampling_temperature: float = field(
        default=1.0, metadata={"help": "--earm-sampler generator: temperature of sampling"}
    )
    earm_sampling_bf16: bool = field(
        default=False,
        metadata={
            "help": "draw negatives by matrix products in bfloat16, where the processor has them: quicker, from nearly the same "
            "distribution; the logits themselves, the loss and its gradient stay as they are"
        },
    )
    earm_control: bool = field(
        default=False,
        metadata={"help": "the control row: E-ARM's likelihood terms without energy or negatives; nothing is sampled"},
    )
    earm_loss_rows: int = field(
        default=0,
        metadata={
            "help": "hold the logits of so many tokens at once, and compute them again in the backward pass (512 is a good "
            "number): less memory where the vocabulary is large; 0: hold them all"
        },
    )
    max_epoch: int = II("optimization.max_epoch")
    max_update: int = II("optimization.max_update")


def check_config(cfg) -> None:
    """Refuse settings that cannot work, before any training.

    Args:
        cfg: the criterion's configuration.
    Raises:
        UsageError: one line with the flag, its value and the remedy.
    """
    for problem, flag, remedy in _problems(cfg):
        if problem:
            value = getattr(cfg, flag[2:].replace("-", "_"))
            raise UsageError(f"{flag} {value}: {remedy}")


def check_task(cfg, task) -> None:
    """Refuse flags that do not go with the task's.

    Raises:
        UsageError: the first of them.
    """
    scheduled = getattr(getattr(task, "cfg", None), "scheduled_sampling", "none")
    if cfg.earm_loss_rows and scheduled != "none":
        raise UsageError(
            f"--earm-loss-rows {cfg.earm_loss_rows}: --scheduled-sampling {scheduled} reads the logits of all tokens; leave one of "
            "the two out"
        )


def check_effect(cfg, without_effect) -> None:
    """Refuse flags that were given and mean nothing for the task's kind of model.

    Args:
        without_effect: their names in `cfg`.
    Raises:
        UsageError: the first of them.
    """
    for name in without_effect:
        if getattr(cfg, name) != EarmCrossEntropyConfig.__dataclass_fields__[name].default:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(cfg, name)}: no effect on the negatives of this task's models; leave it out")


def _problems(cfg):
    """Pairs of a condition that must not hold and what to say of it: (condition, flag, remedy)."""
    truncates = cfg.earm_sampling_topk != -1 or cfg.earm_sampling_topp != -1 or cfg.earm_sampling_temperature != 1
    return [
        (not 0 <= cfg.earm_weight < math.inf, "--earm-weight", "give a finite weight of at least 0"),
        *_schedule_problems(cfg),
        (cfg.earm_recent_tokens < -1, "--earm-recent-tokens", "give a number of tokens, 0 for none or -1 for all"),
        (
            cfg.earm_smooth_history and cfg.earm_recent_tokens == 0,
            "--earm-smooth-history",
            "there is no history to smooth with --earm-recent-tokens 0; leave one of the two out",
        ),
        (cfg.earm_negatives < 1, "--earm-negatives", "give at least 1"),
        (cfg.earm_loss_rows < 0, "--earm-loss-rows", "give a number of tokens, or 0 for all"),
        (
            cfg.earm_negatives == 1 and cfg.earm_normalizer == "source" and not cfg.earm_control,
            "--earm-negatives",
            "one negative per source makes every weight 1 under --earm-normalizer source; give at least 2, or use batch",
        ),
        (not 0 <= cfg.earm_normalizer_ema < 1, "--earm-normalizer-ema", "give a number from 0 to below 1"),
        (
            cfg.earm_normalizer_ema > 0 and cfg.earm_normalizer == "source",
            "--earm-normalizer-ema",
            "a source's normaliser is not met again; use --earm-normalizer batch, or 0",
        ),
        (not 0 <= cfg.earm_max_len_a < math.inf, "--earm-max-len-a", "give a finite number of at least 0"),
        (cfg.earm_max_len_b < 0, "--earm-max-len-b", "give a number of at least 0"),
        (cfg.earm_max_len_a == 0 == cfg.earm_max_len_b, "--earm-max-len-b", "gives negatives no token; give at least 1"),
        (
            truncates and cfg.earm_sampler != "generator",
            "--earm-sampler",
            "top-k, top-p and temperature need --earm-sampler generator; the ancestral sampler draws from the softmax itself",
        ),
        (
            cfg.earm_sampling_bf16 and cfg.earm_sampler != "ancestral",
            "--earm-sampling-bf16",
            "--earm-sampler generator draws in the model's own precision; use ancestral, or leave the flag out",
        ),
        (not 0 <= cfg.label_smoothing <= 1, "--label-smoothing", "give a number from 0 to 1"),
        (not 0 < cfg.earm_sampling_temperature < math.inf, "--earm-sampling-temperature", "give a number above 0"),
        (cfg.earm_sampling_topk < -1 or cfg.earm_sampling_topk == 0, "--earm-sampling-topk", "give at least 1, or -1 for all"),
        (
            cfg.earm_sampling_topp != -1 and not 0 < cfg.earm_sampling_topp <= 1,
            "--earm-sampling-topp",
            "give a probability above 0, or -1 for all",
        ),
        (
            cfg.earm_sampling_topk != -1 != cfg.earm_sampling_topp,
            "--earm-sampling-topk",
            f"--earm-sampling-topp {cfg.earm_sampling_topp} goes before it; give one of the two",
        ),
    ]


def _schedule_problems(cfg):
    by_update = cfg.earm_start_update >= 0
    used = cfg.earm_weight != 0
    max_epoch, max_update = cfg.max_epoch or 0, cfg.max_update or 0
    return [
        (cfg.earm_start_epoch < 1, "--earm-start-epoch", "epochs are counted from 1; give at least 1"),
        (cfg.earm_start_update < -1, "--earm-start-update", "give an update of at least 0, or -1 to start by epoch"),
        (cfg.earm_warmup_updates < 0, "--earm-warmup-updates", "give a number of at least 0"),
        (
            used and not by_update and 0 < max_epoch < cfg.earm_start_epoch,
            "--earm-start-epoch",
            f"training ends with --max-epoch {max_epoch}, so E-ARM would never start; start earlier or train longer",
        ),
        (
            used and by_update and 0 < max_update <= cfg.earm_start_update,
            "--earm-start-update",
            f"training ends with --max-update {max_update}, so E-ARM would never start; start earlier or train longer",
        ),
    ]
