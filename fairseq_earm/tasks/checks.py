"""What tasks check before any work, and share."""
import logging
import math
from typing import Optional

from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import DictConfig

from fairseq_earm.errors import UsageError
from fairseq_earm.models.energy_transformer import EnergyModel

logger = logging.getLogger(__name__)

# Flags and their defaults.
RERANKING = {"energy_weight": 1.0, "energy_select": "best", "energy_step": "last"}
PROPOSAL = {"negatives_temperature": 1.0, "negatives_topk": -1, "negatives_topp": -1.0}
NEGATIVES_FLAGS = ("--negatives-temperature", "--negatives-topk", "--negatives-topp")


def generating(cfg) -> Optional[DictConfig]:
    """All settings of a run that generates, None in other runs. A task is given its own part of them, without --path."""
    settings = cfg._get_root() if isinstance(cfg, DictConfig) else {}
    return settings if "generation" in settings and settings.common_eval.path is not None else None


def check_energy_flags(cfg, active: bool, flag: str) -> None:
    """Refuse a weight that cannot be, and say which flags have no effect.

    Args:
        cfg: the task's configuration; it may lack `energy_step`.
        active: whether candidates are reranked.
        flag: the flag that turns reranking on.
    Raises:
        UsageError: an energy weight that is negative or not finite.
    """
    if not (math.isfinite(cfg.energy_weight) and cfg.energy_weight >= 0):
        raise UsageError(f"--energy-weight {cfg.energy_weight} is not a finite number of 0 or more: give one, or leave it out")
    if not active:
        _report_idle(cfg, RERANKING, f"without {flag}")


def check_proposal(temperature: float, topk: int, topp: float, *, symbols: int, flags=NEGATIVES_FLAGS) -> None:
    """Refuse settings of the base's softmax over so many symbols that cannot be sampled from (UsageError); `flags` set them."""
    if not 0 < temperature < math.inf:
        raise UsageError(f"{flags[0]} {temperature}: give a finite number above 0")
    if topk != -1 and not 1 <= topk <= symbols:
        raise UsageError(f"{flags[1]} {topk}: give 1 to {symbols}, the size of the dictionary, or -1 for all tokens")
    if topp != -1 and not 0 < topp <= 1:
        raise UsageError(f"{flags[2]} {topp}: give a probability above 0, or -1 for all tokens")
    if topk != -1 and topp != -1:
        raise UsageError(f"{flags[1]} {topk} and {flags[2]} {topp}: give one of the two")


def report_idle_proposal(cfg) -> None:
    """Say which flags have no effect on samples that were drawn beforehand."""
    _report_idle(cfg, PROPOSAL, f"with --negatives {cfg.negatives}")


def report_other_proposal(source: str, *, temperature: float, topk: int, topp: float) -> None:
    """Warn where negatives are not drawn from the base's own softmax; `source` says in words whose settings these are."""
    if temperature != 1 or topk != -1 or topp not in (-1, 1):
        logger.warning(
            "%s: temperature %g, top-k %d, top-p %g: the energy learns the residual of this proposal, not of the base, and the joint "
            "model of base and energy is another one than was learnt; leave these settings out unless that is wanted",
            source, temperature, topk, topp,
        )


def check_trains(cfg) -> None:
    """Refuse a task's `--energy-path` in training (UsageError), where nothing would look at it."""
    if cfg.energy_path is not None:
        raise UsageError(
            f"--energy-path {cfg.energy_path} is for generating, and training does not read it: to go on from an energy network give "
            "--finetune-from-model"
        )


def check_criterion(cfg, prepared: bool) -> None:
    """Refuse a criterion, by its configuration, that never asked for negatives (UsageError); `prepared` says whether it did."""
    if not prepared:
        name = getattr(cfg, "_name", None) or getattr(cfg, "criterion", None)
        raise UsageError(f"--criterion {name} does not train an energy network: give --criterion residual_nce")


def check_energy_network(cfg) -> None:
    """Refuse a model's configuration that is to be trained and is no energy network's (UsageError)."""
    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
    if not issubclass(ARCH_MODEL_REGISTRY.get(name, object), EnergyModel):
        raise UsageError(f"--arch {name} is no energy network; give one such as bit_base or unit, with --criterion residual_nce")


def _report_idle(cfg, defaults: dict, condition: str) -> None:
    given = {name: getattr(cfg, name, default) for name, default in defaults.items()}
    idle = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value != defaults[name]]
    if idle:
        logger.warning("%s %s: no effect", ", ".join(idle), condition)
