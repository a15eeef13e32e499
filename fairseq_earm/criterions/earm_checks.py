"""Flags of `earm_cross_entropy` that cannot work are refused before any training, in one line."""

import math

from fairseq_earm.criterions.earm_config import EarmCrossEntropyConfig
from fairseq_earm.ebm.objectives import CONTROLS, WITHOUT_NEGATIVES, control_named
from fairseq_earm.errors import UsageError


def check_config(cfg) -> None:
    """Refuse settings that cannot work, before any training.

    Args:
        cfg: the criterion's configuration.
    Raises:
        UsageError: one line with the flag, its value and the remedy.
    """
    for problem, flag, remedy in (*_problems(cfg), *_objective_problems(cfg)):
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
            f"--earm-loss-rows {cfg.earm_loss_rows}: --scheduled-sampling {scheduled} reads the logits of all tokens; "
            "leave one of the two out"
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
            raise UsageError(
                f"{flag} {getattr(cfg, name)}: no effect on the negatives of this task's models; leave it out"
            )


def _truncates(cfg) -> bool:
    """Whether samples come from another distribution than the softmax."""
    return cfg.earm_sampling_topk != -1 or cfg.earm_sampling_topp != -1 or cfg.earm_sampling_temperature != 1


def _problems(cfg):
    """Triples of a condition that must not hold, its flag and the remedy."""
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
            cfg.earm_negatives == 1
            and cfg.earm_normalizer == "source"
            and control_named(cfg.earm_control) not in WITHOUT_NEGATIVES,
            "--earm-negatives",
            "one negative per source makes every weight 1 under --earm-normalizer source; give at least 2, or use "
            "batch",
        ),
        (not 0 <= cfg.earm_normalizer_ema < 1, "--earm-normalizer-ema", "give a number from 0 to below 1"),
        (
            cfg.earm_normalizer_ema > 0 and cfg.earm_normalizer == "source",
            "--earm-normalizer-ema",
            "a source's normaliser is not met again; use --earm-normalizer batch, or 0",
        ),
        (not 0 <= cfg.earm_max_len_a < math.inf, "--earm-max-len-a", "give a finite number of at least 0"),
        (cfg.earm_max_len_b < 0, "--earm-max-len-b", "give a number of at least 0"),
        (
            cfg.earm_max_len_a == 0 == cfg.earm_max_len_b,
            "--earm-max-len-b",
            "gives negatives no token; give at least 1",
        ),
        (
            _truncates(cfg) and cfg.earm_sampler != "generator",
            "--earm-sampler",
            "top-k, top-p and temperature need --earm-sampler generator; the ancestral sampler draws from the softmax "
            "itself",
        ),
        (
            cfg.earm_sampling_bf16 and cfg.earm_sampler != "ancestral",
            "--earm-sampling-bf16",
            "--earm-sampler generator draws in the model's own precision; use ancestral, or leave the flag out",
        ),
        (not 0 <= cfg.label_smoothing <= 1, "--label-smoothing", "give a number from 0 to 1"),
        (not 0 < cfg.earm_sampling_temperature < math.inf, "--earm-sampling-temperature", "give a number above 0"),
        (
            cfg.earm_sampling_topk < -1 or cfg.earm_sampling_topk == 0,
            "--earm-sampling-topk",
            "give at least 1, or -1 for all",
        ),
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


def _objective_problems(cfg):
    """The same of flags that say what is descended."""
    control, nce = control_named(cfg.earm_control), cfg.earm_objective == "nce"
    needs_score = cfg.earm_objective == "kl" and control in ("none", "noise")
    return [
        (
            control not in ("none", *CONTROLS),
            "--earm-control",
            f"give one of {', '.join(CONTROLS)} behind the flag, or nothing for likelihood, and the folder of data "
            "before it",
        ),
        (
            control != "none" and nce,
            "--earm-objective",
            f"the controls are those of kl; leave --earm-control {control} out, or give --earm-objective kl",
        ),
        (
            not 0 < cfg.earm_control_weight < math.inf,
            "--earm-control-weight",
            "give a finite number above 0; --earm-control likelihood is the control without a penalty",
        ),
        (
            cfg.earm_control_weight != 1 and control != "flat",
            "--earm-control-weight",
            "no effect without --earm-control flat; give both, or neither",
        ),
        (
            needs_score and _truncates(cfg) and cfg.earm_variance_reduction == "full",
            "--earm-variance-reduction",
            "its baseline needs samples of the softmax itself, without top-k, top-p or a temperature; give none, or "
            "leave those out",
        ),
        (
            nce and cfg.earm_normalizer_ema > 0,
            "--earm-normalizer-ema",
            "--earm-objective nce differentiates through the normaliser of each batch; give 0",
        ),
        (
            control == "likelihood" and cfg.earm_dropout == "energy-off",
            "--earm-dropout",
            "--earm-control likelihood has no energies to leave dropout out of; give off or shared",
        ),
        (cfg.earm_every < 1, "--earm-every", "give a number of updates of at least 1"),
        (
            cfg.earm_every > 1 and cfg.earm_cross_entropy == "replace",
            "--earm-every",
            "--earm-cross-entropy replace would leave the other updates without a loss; give 1, or add",
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
        (
            used
            and by_update
            and cfg.earm_every > 1
            and 0 < max_update <= first_multiple(cfg.earm_start_update, cfg.earm_every),
            "--earm-every",
            f"no update from --earm-start-update {cfg.earm_start_update} to the end is a multiple of it; give less",
        ),
    ]


def first_multiple(start: int, every: int) -> int:
    """The first number from `start` on that `every` divides."""
    return -(-start // max(every, 1)) * max(every, 1)
