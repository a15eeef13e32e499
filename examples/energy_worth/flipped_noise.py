"""`fairseq-train` with the noise control's noise turned round: `flipped_noise.py TRAIN_ARGUMENTS`.

Noise of mean zero does the same with either sign; a bias, such as that of dropout or of rows that end, does the
opposite. Its likelihood stays, so that the loss is
twice the likelihood less the noise control's loss.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_earm.ebm import objectives  # noqa: E402

noise = objectives.noise


def flipped(found) -> objectives.EarmLoss:
    """2 · likelihood − noise, over the same steps."""
    ordinary = noise(found)
    likelihood = objectives.likelihood(found.data._replace(mask=found.data_mask))
    return ordinary._replace(loss=2 * likelihood - ordinary.loss)


def cli_main() -> None:
    from fairseq_cli import train

    objectives.noise = flipped
    train.cli_main()


if __name__ == "__main__":
    cli_main()
