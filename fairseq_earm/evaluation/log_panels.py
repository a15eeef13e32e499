"""What training logs, panel by panel: which keys, in which unit, and what to look for."""
from __future__ import annotations

from typing import Dict, NamedTuple, Tuple

from fairseq_earm.evaluation.training_log import EPOCHS, INNER, History, cross_entropy_key, is_residual, logged_names

CROSS_ENTROPY, CRITERION = "cross-entropy", "criterion"  # keys that differ from run to run, see `logged_keys`
# Figures of the machine and of the batches, and what other figures say too.
BOOKKEEPING = {
    "epoch", "update", "num_updates", "loss", "nll_loss", "ppl", "wps", "wpb", "bsz", "clip", "train_wall", "wall", "gb_free",
    "best_loss", "loss_scale",
}


class Panel(NamedTuple):
    """One panel.

    Attributes:
        lines: (key, style) of each line of a run.
        says: what it shows and what to look for.
        validated: whether the sets that were validated are drawn too.
        zero, log: a line at 0; a logarithmic axis.
        settles: the axis is cut where the beginning would squeeze the rest.
    """

    title: str
    ylabel: str
    lines: Tuple[Tuple[str, str], ...]
    says: str
    validated: bool = False
    zero: bool = False
    log: bool = False
    settles: bool = False


PANELS = (
    Panel(
        "Cross-entropy", "base 2, per token", ((CROSS_ENTROPY, "-"),),
        "Negative log-likelihood without label smoothing or energies: lower is better, and runs compare on the validated sets.",
        validated=True, settles=True,
    ),
    Panel(
        "Bits per dimension", "bits per dimension", (("bits_per_dim", "-"),),
        "Cross-entropy of images, for each value of each pixel: lower is better.", validated=True, settles=True,
    ),
    Panel(
        "Loss", "base 2", ((CRITERION, "-"),),
        "What the criterion minimises: with label smoothing and, while E-ARM is active, λ times its loss; of a residual energy the "
        "loss of noise-contrastive estimation, 2 at chance with one negative. Validation runs the stock criterion alone.",
        validated=True, settles=True,
    ),
    Panel(
        "DV bound", "nats", (("earm_dv", "-"),),
        "Donsker-Varadhan bound, the mean over data of logsumexp minus the log normaliser: above 0 the energy knows something that the "
        "model's own distribution does not; at or below 0 it has learnt nothing.", zero=True,
    ),
    Panel(
        "E-ARM loss", "per energy step, without λ", (("earm_loss", "-"),),
        "Positive phase minus negative phase: it has no target value; a jump says that the energies run away. Of a control, its "
        "own terms.",
    ),
    Panel(
        "Energies", "nats", (("earm_energy_data", "-"), ("earm_energy_negatives", "--")),
        "Mean energy (−logsumexp) of data, solid, and of the model's samples, dashed: both may drift together, which means nothing.",
    ),
    Panel(
        "Energy gap", "nats", (("earm_energy_gap", "-"),), "Energy of the samples minus that of data: it should be above 0.", zero=True,
    ),
    Panel(
        "Log normaliser", "nats", (("earm_log_normalizer", "-"),),
        "Mean log normaliser of the importance weights: it may drift with the energies; it should not run away.",
    ),
    Panel(
        "Effective sample size", "share of the negatives", (("earm_ess", "-"),),
        "Near 1 the importance weights are flat, near 0 one sample carries the batch.",
    ),
    Panel("Largest weight", "times the mean", (("earm_max_weight", "-"),), "The largest importance weight of a batch, whose mean is 1."),
    Panel(
        "Length of the samples", "tokens", (("earm_negative_length", "-"),),
        "Mean length of the negatives: it should stay near that of the data's targets.",
    ),
    Panel(
        "Truncated samples", "share", (("earm_truncated", "-"),),
        "Samples that were cut at the limit: more than a few percent ask for a higher --earm-max-len-a/b or --earm-negative-length.",
    ),
    Panel(
        "Distinct samples", "share", (("earm_distinct", "-"),),
        "Different sequences among the samples of a batch: where it falls, the model draws the same ones again and again.",
    ),
    Panel(
        "Accuracy of the energies", "share", (("nce_accuracy_data", "-"), ("nce_accuracy_negatives", "--")),
        "How often data, solid, and the base's samples, dashed, are told to be what they are: 0.5 is chance with one negative. "
        "With more of them an energy that knows nothing calls everything a sample: 0 and 1.",
    ),
    Panel(
        "Residual energies", "nats", (("nce_energy_data", "-"), ("nce_energy_negatives", "--")),
        "Mean energy of data, solid, and of the base's samples, dashed: data should have the lower.",
    ),
    Panel(
        "Residual energy gap", "nats", (("nce_energy_gap", "-"),), "Energy of the base's samples minus that of data: it should grow above 0.",
        zero=True,
    ),
    Panel(
        "Self-normalisation", "mean of exp(−E)", (("nce_self_normalisation", "-"),),
        "Over the base's samples: 1 at the optimum; far from it, a few samples or none carry the weight.",
    ),
    Panel("Accuracy", "%", (("accuracy", "-"),), "Tokens that the model ranks first (--report-accuracy).", validated=True),
    Panel("BLEU", "BLEU", (("bleu", "-"),), "Of the validation set, as --eval-bleu measured it.", validated=True),
    Panel(
        "Teacher forcing", "probability", (("teacher_forcing", "-"),), "Of scheduled sampling: how often the decoder reads the data's token.",
    ),
    Panel(
        "Gradient norm", "before clipping", (("gnorm", "-"), ("earm_gnorm", "--")),
        "A step up where E-ARM enters is expected; growth that does not stop is the beginning of divergence. Dashed, "
        "under "
        "--earm-every: of the updates that have E-ARM, whose gradient is that many times as large.", log=True,
    ),
    Panel(
        "Clipped updates with E-ARM", "%", (("earm_clip", "-"),),
        "Under --earm-every: how often the gradient of an update that has E-ARM was clipped, which shortens E-ARM's "
        "part of training.",
    ),
    Panel("Learning rate", "", (("lr", "-"),), "The schedule as it was run."),
    Panel("Skipped updates", "so far", (("earm_skipped_updates", "-"),), "Updates left out because the gradient was not finite."),
    Panel("Sampling", "seconds per batch", (("earm_sampling_seconds", "-"),), "Time spent on drawing negatives."),
    Panel("Updates per second", "", (("ups", "-"),), "What an update costs: with E-ARM about 2.5 times as much as without."),
)


def logged_keys(history: History) -> Dict[str, str]:
    """Each panel's key → the key of the log that it means for this run; without those that the run did not log."""
    names = logged_names(history)
    keys = {key: key for panel in PANELS for key, _ in panel.lines if key in names}
    residual = is_residual(history)
    if not residual and "bits_per_dim" not in names:
        keys[CROSS_ENTROPY] = cross_entropy_key(history)
    records = (record for kind in history for record in history[kind])
    if residual or any("nll_loss" in record and record.get("loss") != record["nll_loss"] for record in records):
        keys[CRITERION] = "loss"
    return keys


def undrawn_keys(history: History) -> Tuple[str, ...]:
    """What was logged in training, and no panel shows."""
    training = {kind: history.get(kind, []) for kind in (INNER, EPOCHS)}
    return tuple(sorted(logged_names(training) - set(logged_keys(history).values()) - BOOKKEEPING))
