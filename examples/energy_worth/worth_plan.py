"""Every corpus, base, branch, rate and number of seeds of the experiment. How they were chosen: README.md."""
from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Dict, List, Tuple

CROSS_ENTROPY = shlex.split("--criterion label_smoothed_cross_entropy")
EARM = shlex.split("--criterion earm_cross_entropy --earm-start-epoch 1 --earm-weight 1")
LAST = shlex.split("--earm-energy-steps last --earm-recent-tokens 0")
POST = shlex.split("--earm-energy-steps post --earm-recent-tokens 0")
OFF = shlex.split("--earm-dropout off")
ROUGH = shlex.split("--earm-control noise --earm-variance-reduction none")


@dataclass(frozen=True)
class Branch:
    """One way to go on from a base.

    Attributes:
        flags: of the criterion.
        energy_step: where log μ is read when the model is judged.
        updates: as a multiple of the other branches'.
        script: a file beside this one that trains in the place of `fairseq-train`.
    """

    flags: List[str]
    energy_step: str = "last"
    updates: float = 1.0
    script: str = ""


def earm(*flags: str, **settings) -> Branch:
    """A branch of `earm_cross_entropy` with λ = 1 from the first update on."""
    return Branch([*EARM, *flags], **settings)


# Under two tokens of history and an energy on every step, the paper's setting, unless the name says otherwise.
CONTROLS: Dict[str, Branch] = {
    "cross-entropy": Branch(CROSS_ENTROPY),
    "cross-entropy, 2.5 x updates": Branch(CROSS_ENTROPY, updates=2.5),
    "likelihood": earm("--earm-control", "likelihood"),
    "likelihood, off": earm("--earm-control", "likelihood", *OFF),
    "noise": earm("--earm-control", "noise"),
    "noise, none": earm(*ROUGH),
    "noise, none, flipped": earm(*ROUGH, script="flipped_noise.py"),
    "noise, off": earm("--earm-control", "noise", *OFF),
    "flat 0.1": earm("--earm-control", "flat", "--earm-control-weight", "0.1"),
    "flat 1": earm("--earm-control", "flat", "--earm-control-weight", "1"),
    "flat 1, off": earm("--earm-control", "flat", "--earm-control-weight", "1", *OFF),
    "cross-entropy, dropout 0": Branch([*CROSS_ENTROPY, "--dropout", "0"]),
    "cross-entropy, dropout 0.1": Branch([*CROSS_ENTROPY, "--dropout", "0.1"]),
    "likelihood, dropout 0": earm("--earm-control", "likelihood", "--dropout", "0"),
    "noise, none, dropout 0": earm(*ROUGH, "--dropout", "0"),
    "noise, none, flipped, dropout 0": earm(*ROUGH, "--dropout", "0", script="flipped_noise.py"),
}
ENERGIES: Dict[str, Branch] = {
    "kl, none": earm("--earm-variance-reduction", "none"),
    "kl, full": earm(),
    "kl, full, off": earm(*OFF),
    "kl, full, energy-off": earm("--earm-dropout", "energy-off"),
    "kl, full, dropout 0": earm("--dropout", "0"),
    "kl, full, every 4": earm("--earm-every", "4"),
    "kl, full, replace": earm("--earm-cross-entropy", "replace"),
    "kl, last": earm(*LAST),
    "nce": earm("--earm-objective", "nce"),
    "nce, off": earm("--earm-objective", "nce", *OFF),
    "nce, last": earm("--earm-objective", "nce", *LAST),
    "nce, post": earm("--earm-objective", "nce", *POST, energy_step="post"),
}
BRANCHES = {**CONTROLS, **ENERGIES}


@dataclass(frozen=True)
class Corpus:
    """What is trained on, and the bases that branches start from.

    Attributes:
        flags: of `fairseq-train`, for base and branches alike.
        base_flags: of the base alone.
        updates: of a branch.
        rates: learning rates of the grid; each falls linearly to zero.
        branches: names in `BRANCHES`.
        tuning_seeds, fresh_seeds: the rate is chosen on the first, and the verdict rests on the second.
        samples: translations drawn per source to measure a model.
        max_len: a, b of the longest sample.
        pairs: of the synthetic language; 0 where the data and the base are given.
        generate: flags of `fairseq-generate`; none: nothing is generated.
    """

    flags: List[str]
    updates: int
    rates: Tuple[float, ...]
    branches: Tuple[str, ...]
    base_flags: List[str] = field(default_factory=list)
    tuning_seeds: Tuple[int, ...] = (1, 2)
    fresh_seeds: Tuple[int, ...] = (3, 4, 5, 6, 7)
    samples: int = 8
    max_len: Tuple[float, int] = (2.0, 5)
    pairs: int = 0
    generate: List[str] = field(default_factory=list)


def synthetic(pairs: int, dropout: float, base_updates: int, updates: int, branches) -> Corpus:
    """The language of examples/synthetic, whose distribution is known."""
    sides = [
        f"--{side}-layers 1 --{side}-embed-dim 64 --{side}-ffn-embed-dim 128 --{side}-attention-heads 4"
        for side in ("encoder", "decoder")
    ]
    flags = (
        f"--arch transformer --share-decoder-input-output-embed {' '.join(sides)} --dropout {dropout} "
        "--label-smoothing 0 --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 5 --max-tokens 1000 "
        "--log-interval 25"
    )
    base = shlex.split(f"--lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 200 --max-update {base_updates}")
    return Corpus(shlex.split(flags), updates, (1e-3, 3e-3), branches, [*CROSS_ENTROPY, *base], pairs=pairs)


ALWAYS = (
    *("cross-entropy", "cross-entropy, 2.5 x updates", "likelihood", "noise", "noise, none", "flat 0.1", "flat 1"),
    *("kl, none", "kl, full", "kl, last", "nce", "nce, last", "nce, post"),
)
WITH_DROPOUT = (
    *ALWAYS, "likelihood, off", "noise, off", "flat 1, off",
    *("kl, full, off", "kl, full, energy-off", "nce, off", "kl, full, every 4"),
)
DROPOUT_TUNED = (
    *WITH_DROPOUT, "noise, none, flipped", "cross-entropy, dropout 0", "cross-entropy, dropout 0.1",
    *("likelihood, dropout 0", "noise, none, dropout 0", "noise, none, flipped, dropout 0", "kl, full, dropout 0"),
)
MULTI30K = """
    -s de -t en --arch transformer_iwslt_de_en --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 128
    --decoder-embed-dim 128 --encoder-ffn-embed-dim 512 --decoder-ffn-embed-dim 512 --encoder-attention-heads 4
    --decoder-attention-heads 4 --share-all-embeddings --dropout 0.2 --optimizer adam --adam-betas '(0.9, 0.98)'
    --clip-norm 1.0 --label-smoothing 0.1 --max-tokens 2560 --required-batch-size-multiple 1 --log-interval 20
"""
CORPORA: Dict[str, Corpus] = {
    "synthetic-1500-dropout0": synthetic(1_500, 0.0, 1000, 600, ALWAYS),
    "synthetic-1500-dropout0.1": synthetic(1_500, 0.1, 1000, 600, WITH_DROPOUT),
    "synthetic-1500-dropout0.3": synthetic(1_500, 0.3, 1000, 600, WITH_DROPOUT),
    "synthetic-20000-dropout0": synthetic(20_000, 0.0, 1500, 300, ALWAYS),
    "multi30k": Corpus(
        shlex.split(MULTI30K), 100, (3e-5, 1e-4, 3e-4), DROPOUT_TUNED, samples=6, max_len=(1.5, 10),
        generate=shlex.split("-s de -t en --beam 5 --remove-bpe --required-batch-size-multiple 1"),
    ),
}
