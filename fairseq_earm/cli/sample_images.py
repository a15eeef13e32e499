"""fairseq-earm-sample for models of images: draw images and write them as a grid into one PNG file."""
from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import os
from typing import Sequence

import numpy as np
import torch
from fairseq import checkpoint_utils
from torch import Tensor
from tqdm import tqdm

from fairseq_earm.cli.common import check_seed, device, writing
from fairseq_earm.errors import UsageError, reason
from fairseq_earm.evaluation.whole_file import whole_file
from fairseq_earm.sampling.images import draw_images

ENDING = ".png"
TASK = "earm_image_modeling"
GAP, PAPER = 1, 255  # between images, in their pixels; and its brightness
WIDTH = 600  # small images are enlarged, pixel by pixel, as far as the grid gets no wider


def wants_images(argv: Sequence[str]) -> bool:
    """Whether the command's --output is a PNG file, not the folder of a text model's samples."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--output", default="")
    return parser.parse_known_args(argv)[0].output.lower().endswith(ENDING)


def main(argv: Sequence[str]) -> None:
    """Draw and write; says what was done."""
    args = _parser().parse_args(argv)
    _check_flags(args)
    decoder = _decoder(args.path).to(device(args))
    values, log_q = _draw(args, decoder)
    if not log_q.isfinite().all():
        raise UsageError(f"--path {args.path}: the model's probabilities are no numbers; give another checkpoint")
    _write(enlarged(image_grid(values, decoder, args.columns)), args.output)
    bits = -log_q.mean().item() / math.log(2)
    print(f"{args.output}: {args.samples} images of {_size(decoder)}, seed {args.seed}, {bits:.3f} bits per dimension under the model")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairseq-earm-sample", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--path", required=True, metavar="FILE", help=f"checkpoint of --task {TASK}")
    parser.add_argument("--output", required=True, metavar="FILE.png", help="where the grid goes")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="images")
    parser.add_argument("--columns", type=int, default=8, metavar="N", help="images in a row of the grid")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="other seeds draw other images")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images drawn side by side")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    for flag, least in (("samples", 1), ("columns", 1), ("batch_size", 1)):
        if getattr(args, flag) < least:
            raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give at least {least}")
    check_seed(args.seed)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"--output {args.output}: PNG files are written with matplotlib, which is not installed: install it")
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"--output {args.output}: there is no folder {folder}; make it, or give another")
    if os.path.isdir(args.output) or not os.access(args.output if os.path.exists(args.output) else folder, os.W_OK):
        raise UsageError(f"--output {args.output} cannot be written; give another")


def _decoder(path: str):
    """The decoder of a checkpoint of images, which needs no data.

    Raises:
        UsageError: no such file, or a checkpoint of another kind.
    """
    if not os.path.isfile(path):
        raise UsageError(f"--path {path}: there is no such file; give a checkpoint of fairseq-train")
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(path, {"data": None})
        kind = state["cfg"].task._name
    except Exception as error:  # fairseq raises whatever it likes at files that are no checkpoints
        raise UsageError(f"--path {path}: no checkpoint of fairseq-train ({reason(error)})") from error
    if kind != TASK:
        raise UsageError(f"--path {path} is a model of task {kind}: a PNG takes one of {TASK}; for text give a folder as --output")
    try:
        models, _, _ = checkpoint_utils.load_model_ensemble_and_task([path], state=state)
    except Exception as error:
        raise UsageError(f"--path {path}: a model that cannot be built ({reason(error)})") from error
    decoder = models[0].eval().decoder
    if decoder.image_shape[2] not in (1, 3):
        raise UsageError(f"--path {path}: images of {decoder.image_shape[2]} colours; a PNG shows one or three")
    return decoder


def _draw(args: argparse.Namespace, decoder) -> tuple:
    """(N, T) values and their log-probabilities, each batch drawn on random numbers that follow from the seed."""
    generator = torch.Generator(device(args)).manual_seed(args.seed)
    batches = [min(args.batch_size, args.samples - first) for first in range(0, args.samples, args.batch_size)]
    drawn = []
    with tqdm(desc=args.output, total=args.samples * decoder.max_positions(), unit=" values", disable=None) as bar:
        for count in batches:
            try:
                drawn.append(draw_images(decoder, count, generator=generator, progress=_advance(bar, count)))
            except torch.cuda.OutOfMemoryError:
                raise UsageError(f"--batch-size {args.batch_size}: so many images do not fit on the GPU; give fewer") from None
    return tuple(torch.cat(parts).cpu() for parts in zip(*drawn))


def _advance(bar: tqdm, count: int):
    def steps(positions):
        for position in positions:
            yield position
            bar.update(count)

    return steps


def image_grid(values: Tensor, decoder, columns: int) -> np.ndarray:
    """(H, W, 3) uint8: images of (N, T) values side by side, the first at the upper left; one colour is shown as grey."""
    height, width, colours = decoder.image_shape
    images = values.view(-1, height, width, colours).numpy() * 255 // (decoder.levels - 1)
    rows = -(-len(images) // columns)
    grid = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), PAPER, np.uint8)
    for number, image in enumerate(images):
        top, left = GAP + number // columns * (height + GAP), GAP + number % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def enlarged(grid: np.ndarray) -> np.ndarray:
    """The grid with each pixel as many times across and down as fits into `WIDTH`, at least once."""
    times = max(1, WIDTH // grid.shape[1])
    return grid.repeat(times, 0).repeat(times, 1)


def _write(grid: np.ndarray, path: str) -> None:
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq has everything logged
    from matplotlib import image

    with writing("--output", path), whole_file(path) as file:
        image.imsave(file, grid, format=ENDING[1:])


def _size(decoder) -> str:
    return "x".join(map(str, decoder.image_shape))
