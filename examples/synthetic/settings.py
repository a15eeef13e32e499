"""Every size, flag and learning rate of the demonstration, in one place. How they were chosen: README.md."""
from __future__ import annotations

from typing import Dict, List, NamedTuple, Tuple

ARCHITECTURE = [
    "--arch", "transformer", "--share-decoder-input-output-embed", "--dropout", "0",
    "--encoder-layers", "1", "--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "128", "--encoder-attention-heads", "4",
    "--decoder-layers", "1", "--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "128", "--decoder-attention-heads", "4",
]
OPTIMIZER = ["--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "5", "--max-tokens", "1000"]
# Cross-entropy without smoothing; stock fairseq logs its valid NLL under this name as E-ARM's criterion does.
CROSS_ENTROPY = ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0"]
BASE_LEARNING_RATE = 3e-3
BASE_WARMUP = 200
BRANCH_WARMUP = 20


class Size(NamedTuple):
    """How much of everything.

    Attributes:
        train, valid, test: sentence pairs.
        base_updates, branch_updates: updates of the base model, and of every branch that starts from it.
        valid_interval: updates between two validations of a branch.
        log_interval: updates between two lines of the training log.
        seeds: each has a base model of its own, from which its branches start.
        samples: translations drawn per source sentence to measure a model.
        candidates: of which energy resampling draws one.
        branches: keys of `BRANCHES`.
    """

    train: int
    valid: int
    test: int
    base_updates: int
    branch_updates: int
    valid_interval: int
    log_interval: int
    seeds: Tuple[int, ...]
    samples: int
    candidates: int
    branches: Tuple[str, ...]


class Branch(NamedTuple):
    """One way to go on from the base model.

    Attributes:
        title: its row in the table.
        learning_rate: the peak, tuned by `demo.py --tune`; it then falls linearly to zero.
        flags: of the criterion.
        energy_step: where log μ is read when the model is judged or reranks.
        controls: names of the branches that it is judged against: they have everything of it but the energy.
        reranks: whether its energy is also used to rerank and resample.
        time_factor: updates as a multiple of the other branches', for the row that has E-ARM's time instead of its updates.
    """

    title: str
    learning_rate: float
    flags: List[str]
    energy_step: str = "last"
    controls: Tuple[str, ...] = ()
    reranks: bool = False
    time_factor: float = 1.0


EARM = ["--criterion", "earm_cross_entropy", "--earm-start-epoch", "1", "--earm-weight", "1"]
NOISY = [*EARM, "--earm-variance-reduction", "none"]
CONTROLS = ("control", "noise")
LAST = [*EARM, "--earm-energy-steps", "last", "--earm-recent-tokens", "0"]

BRANCHES: Dict[str, Branch] = {
    "ce": Branch("cross-entropy", 1e-3, CROSS_ENTROPY),
    "ce-time": Branch("cross-entropy, E-ARM's time", 1e-3, CROSS_ENTROPY, time_factor=2.5),
    "control": Branch("control, likelihood", 1e-3, [*EARM, "--earm-control", "likelihood"], reranks=True),
    "noise": Branch("control, noise", 1e-3, [*EARM, "--earm-control", "noise"]),
    "earm": Branch("E-ARM", 1e-3, EARM, controls=CONTROLS, reranks=True),
    "earm-none": Branch("E-ARM, Eq. 15 as printed", 1e-3, NOISY, controls=CONTROLS, reranks=True),
    "control-last": Branch("control, last step", 1e-3, [*LAST, "--earm-control", "likelihood"], reranks=True),
    "earm-last": Branch("E-ARM, last step", 1e-3, LAST, controls=("control-last",), reranks=True),
}
# What `make demo` runs; --all adds E-ARM with all of its noise, and on the last step alone.
BRANCHES_SHOWN = ("ce", "ce-time", "control", "noise", "earm")

FULL = Size(20_000, 400, 400, 1500, 300, 50, 25, (1, 2, 3), 8, 8, BRANCHES_SHOWN)
QUICK = Size(300, 30, 30, 12, 4, 2, 1, (1,), 4, 2, BRANCHES_SHOWN)
TUNED_BRANCHES = [name for name in BRANCHES if name != "ce-time"]
GRID = [3e-4, 1e-3, 3e-3]


def base_flags(size: Size, seed: int) -> List[str]:
    """Flags of `fairseq-train` for a base model."""
    return [
        *ARCHITECTURE, *OPTIMIZER, *CROSS_ENTROPY, "--seed", str(seed), "--lr", str(BASE_LEARNING_RATE),
        "--lr-scheduler", "inverse_sqrt", "--warmup-updates", str(BASE_WARMUP), "--max-update", str(size.base_updates),
        "--log-interval", str(size.log_interval),
    ]


def branch_flags(branch: Branch, size: Size, seed: int, base: str, learning_rate: float) -> List[str]:
    """Flags of `fairseq-train` for a branch: the same start and data order as its seed's other branches."""
    updates = str(round(size.branch_updates * branch.time_factor))
    return [
        *ARCHITECTURE, *OPTIMIZER, *branch.flags, "--seed", str(seed), "--lr", str(learning_rate),
        "--lr-scheduler", "polynomial_decay", "--warmup-updates", str(min(BRANCH_WARMUP, size.branch_updates // 2)),
        "--total-num-update", updates, "--max-update", updates, f"--finetune-from-model={base}",
        "--validate-interval-updates", str(size.valid_interval), "--log-interval", str(size.log_interval),
    ]
