"""The flags of `earm_cross_entropy`; `earm_checks` says what they may be set to."""
from dataclasses import dataclass, field

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterionConfig
from fairseq.dataclass import ChoiceEnum
from omegaconf import II

from fairseq_earm.ebm.contrast import ENERGY_STEPS, NORMALIZERS, EarmSettings
from fairseq_earm.ebm.objectives import OBJECTIVES

SAMPLERS = ("ancestral", "generator")
VARIANCE_REDUCTIONS = ("none", "rao-blackwell", "full")


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
    earm_every: int = field(
        default=1,
        metadata={
            "help": "use E-ARM in the updates whose number is a multiple of N, with N times its weight, and the stock "
            "criterion in the others: the same expected gradient for less time, in bursts that Adam and --clip-norm "
            "notice"
        },
    )
    earm_objective: ChoiceEnum(list(OBJECTIVES)) = field(
        default="kl",
        metadata={
            "help": "kl: the paper's contrastive divergence (Eq. 15). nce: classify data against negatives at every "
            "step, which is bounded; --earm-variance-reduction has no effect on it, and each worker normalises its own "
            "batch"
        },
    )
    earm_cross_entropy: ChoiceEnum(["add", "replace"]) = field(
        default="add",
        metadata={
            "help": "add: λ times E-ARM beside cross-entropy. replace: E-ARM alone once it has started, with "
            "--earm-weight 1 the paper's Eq. 15, and without label smoothing; during --earm-warmup-updates "
            "cross-entropy fades out as λ grows"
        },
    )
    earm_dropout: ChoiceEnum(["shared", "off", "energy-off"]) = field(
        default="shared",
        metadata={
            "help": "shared: E-ARM uses the pass of cross-entropy, dropout included. off: one more pass of the data, "
            "and that of the negatives, without dropout. energy-off: the same, but the likelihood that E-ARM repeats "
            "keeps its dropout"
        },
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
    earm_variance_reduction: ChoiceEnum(VARIANCE_REDUCTIONS) = field(
        default="full",
        metadata={
            "help": "what takes noise out of E-ARM's gradient without changing its mean. rao-blackwell: the exact "
            "expectation over each negative's current token (without effect under --earm-energy-steps last and post). "
            "full: that and a baseline for the history; not with top-k, top-p or a temperature"
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
    earm_control: str = field(
        default="none",
        metadata={
            "argparse_const": "likelihood",
            "help": "train a control in the place of E-ARM, with the same flags. likelihood (also the bare flag): the "
            "likelihood that E-ARM repeats, without energy or negatives. noise: E-ARM's samples without its energy, "
            "all weights 1. flat: likelihood and a penalty on logsumexp that varies, see "
            "--earm-control-weight",
        },
    )
    earm_control_weight: float = field(
        default=1.0,
        metadata={"help": "--earm-control flat: strength c of the penalty c·Σ d·Var(logsumexp) over the data's steps"},
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
    clip_norm: float = II("optimization.clip_norm")


def loss_settings(cfg) -> EarmSettings:
    """What the flags say about the terms of the loss."""
    steps, reduction = str(cfg.earm_energy_steps), str(cfg.earm_variance_reduction)
    return EarmSettings(
        recent_tokens=cfg.earm_recent_tokens,
        energy_steps=steps,
        normalizer=str(cfg.earm_normalizer),
        rao_blackwell=reduction != "none" and steps == "all",
        baseline=reduction == "full" and cfg.earm_objective != "nce",
    )
