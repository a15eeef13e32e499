"""fairseq's commands on a tiny running text."""
import random

from tests.tiny_translation import command

SIZES = "--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2".split()
TASK = "--task language_modeling --tokens-per-sample 12 --sample-break-mode none".split()
LANGUAGE_MODEL = [*TASK, "--arch", "transformer_lm_residual_tiny", *SIZES]
RESIDUAL_LANGUAGE_MODEL = [*TASK, "--arch", "residual_transformer_lm_tiny", *SIZES]
MASKED_LANGUAGE_MODEL = (
    "--task masked_lm --criterion masked_lm --arch roberta --encoder-layers 2 --encoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 32 --encoder-attention-heads 2 --tokens-per-sample 12 --max-positions 12 "
    "--sample-break-mode none"
).split()
OPTIMISATION = (
    "--optimizer adam --lr 0.01 --batch-size 16 --max-update 6 --cpu --no-progress-bar --no-epoch-checkpoints "
    "--num-workers 0 --log-format json --log-interval 1"
).split()


def write_text(folder, sizes, seed=0):
    """Lines of an alphabet in which each letter prefers the next one."""
    rng, letters = random.Random(seed), "abcdefgh"
    for split, size in sizes.items():
        lines = []
        for _ in range(size):
            place = rng.randrange(len(letters))
            line = []
            for _ in range(rng.randint(3, 9)):
                line.append(letters[place])
                place = (place + rng.choice([1, 1, 1, 2, 5])) % len(letters)
            lines.append(" ".join(line))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def train(data, folder, *arguments):
    """Train and return the last checkpoint."""
    command("train", data, "--save-dir", folder, *OPTIMISATION, *arguments)
    return folder / "checkpoint_last.pt"
