"""What a run's numbers support and what they do not; every word follows from the numbers."""
from __future__ import annotations

import math
import statistics
from typing import Dict, List, NamedTuple, Sequence

import settings

# Two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom: few seeds prove little.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


class Difference(NamedTuple):
    """Mean of paired differences, and half the width of its 95 % interval over seeds (infinite for one seed)."""

    mean: float
    margin: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.mean) > self.margin


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """first − second, seed by seed: both started from the same base model."""
    return interval([a - b for a, b in zip(first, second)])


def interval(values: Sequence[float]) -> Difference:
    """Mean and margin of values over seeds."""
    if len(values) < 2:
        return Difference(values[0], math.inf)
    freedom = min(len(values) - 1, len(STUDENT_T))
    return Difference(statistics.mean(values), STUDENT_T[freedom - 1] * statistics.stdev(values) / math.sqrt(len(values)))


def words(difference: Difference, digits: int = 3) -> str:
    """As text: mean ± margin."""
    mean = f"{difference.mean:+.{digits}f}"
    return f"{mean} (one seed)" if math.isinf(difference.margin) else f"{mean} ± {difference.margin:.{digits}f}"


def compare(results, first: str, second: str, key: str, what: str, lower_is_better: bool, digits: int = 3) -> str:
    """One sentence: is `first` better than `second` by this metric?"""
    difference = paired(results[first][key], results[second][key])
    if math.isinf(difference.margin):
        verdict = "one seed cannot tell"
    elif not difference.is_clear:
        verdict = "seeds differ by as much, so this does not tell them apart"
    elif (difference.mean < 0) == lower_is_better:
        verdict = f"{title(first)} is better"
    else:
        verdict = f"{title(first)} is worse"
    return f"  {what}: {words(difference, digits)}: {verdict}."


def title(name: str) -> str:
    """A model's name in the table."""
    return "base" if name == "base" else settings.BRANCHES[name].title


def controls_of(name: str) -> Sequence[str]:
    """The models that an E-ARM branch is judged against; none for others."""
    return settings.BRANCHES[name].controls if name in settings.BRANCHES else ()


def verdicts(results: Dict[str, Dict[str, List[float]]]) -> List[str]:
    """All sentences, as lines."""
    lines = ["What the numbers support (differences are paired by seed, ± is half a 95 % interval by Student's t):"]
    for name in results:
        controls = controls_of(name)
        for control in controls:
            lines += against_control(results, name, control)
        if controls:
            lines += energy(results, name, controls[0])
    return lines + equal_time(results) + everything_improves(results)


def against_control(results, name: str, control: str) -> List[str]:
    """The comparison that decides: everything of E-ARM but its energy, with a learning rate tuned on its own."""
    metrics = [
        ("kl", "KL of q to the truth", True, 3),
        ("joint_nll", "joint NLL, temperature fitted for both", True, 3),
        ("bleu_beam", "BLEU beam", False, 2),
        ("bleu_reranked", "BLEU reranked", False, 2),
        ("in_language", "share of samples in the language", False, 3),
    ]
    measured = [metric for metric in metrics if metric[0] in results[control]]  # not every control reranks
    compared = [compare(results, name, control, *metric) for metric in measured]
    return [f"{title(name)} minus {title(control)}:", *compared]


def energy(results, name: str, control: str) -> List[str]:
    """Whether the energy has learnt anything."""
    gain = interval(results[name]["joint_gain"])
    if gain.is_clear and gain.mean > 0:
        used = "the fitted energy makes test data likelier than q alone does"
    else:
        used = "the fitted energy does not make test data clearly likelier than q alone does"
    return [
        bound(results, name, control, "dv", "DV bound"),
        bound(results, name, control, "dv_per_source", "DV bound, each source with its own normaliser"),
        f"  NLL of q minus joint NLL {words(gain)} ({title(control)}: {words(interval(results[control]['joint_gain']))}): {used}.",
        reranking(results, name),
    ]


def bound(results, name: str, control: str, key: str, what: str) -> str:
    """What a DV bound says of a model's energy."""
    dv = interval(results[name][key])
    if dv.mean <= 0:
        said = "not above zero, the energy has learnt nothing by this measure"
    elif not dv.is_clear:
        said = "above zero, but not beyond what seeds differ by" if dv.margin < math.inf else "above zero, in one seed"
    else:
        said = "above zero, the energy tells data from the model's samples"
    return f"  {what}: {words(dv)} ({title(control)}: {words(interval(results[control][key]))}): {said}."


def reranking(results, name: str) -> str:
    """What its own energy does for a model at inference."""
    bleu = paired(results[name]["bleu_reranked"], results[name]["bleu_beam"])
    inside = paired(results[name]["in_language_resampled"], results[name]["in_language"])
    said = ["helps" if d.is_clear and d.mean > 0 else "harms" if d.is_clear else "shows no clear effect" for d in (bleu, inside)]
    return (
        f"  its energy at inference: reranking changes BLEU by {words(bleu, 2)} ({said[0]}), "
        f"resampling the share in the language by {words(inside)} ({said[1]})."
    )


def equal_time(results) -> List[str]:
    """E-ARM's updates against as much time spent on cross-entropy."""
    lines = []
    for name in results:
        if controls_of(name):
            pairs = zip(results[name]["seconds_per_update"], results["ce"]["seconds_per_update"])
            ratio = statistics.mean(a / b for a, b in pairs)
            factor = settings.BRANCHES["ce-time"].time_factor
            lines += [
                f"{title(name)} minus {title('ce-time')} (an update took {ratio:.1f} times cross-entropy's here; that row has "
                f"{factor:g} times the updates):",
                compare(results, name, "ce-time", "joint_nll", "joint NLL, temperature fitted for both", True),
                compare(results, name, "ce-time", "kl", "KL of q to the truth", True),
            ]
    return lines


def everything_improves(results) -> List[str]:
    """How much any further training gives, to keep differences between branches in proportion."""
    gain = paired(results["ce"]["kl"], results["base"]["kl"])
    return [f"For proportion: {title('ce')} minus base in KL of q to the truth: {words(gain)}."]
