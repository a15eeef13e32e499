"""How long drawing images takes: value by value with what is known kept, against a whole pass per value.

    sampling_speed.py [--rounds 5] [--batch 16]

Seconds of one core (process time, so that other programs count little), medians over interleaved rounds. The whole passes are
timed at a few values of the image and multiplied: each is the same work.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fairseq_earm.models.pixel_cnn import PixelDecoder  # noqa: E402
from fairseq_earm.models.pixel_networks import GatedPixelCnn, PlainPixelCnn  # noqa: E402
from fairseq_earm.sampling.ancestral import draw  # noqa: E402
from fairseq_earm.sampling.images import draw_images  # noqa: E402
from fairseq_earm.tasks.image_data import Levels  # noqa: E402

PASSES = 4  # whole passes that are timed
KERNELS = {"first_size": 7, "size": 3}
TINY = {"features": 16, "layers": 4, "hidden": 32, **KERNELS}
CASES = {
    "`gated_pixel_cnn_tiny`, 28x28x1": (GatedPixelCnn, (28, 28, 1), TINY),
    "`gated_pixel_cnn_tiny`, 14x14x1": (GatedPixelCnn, (14, 14, 1), TINY),
    "`gated_pixel_cnn_tiny`, 32x32x3": (GatedPixelCnn, (32, 32, 3), TINY),
    "`gated_pixel_cnn`, 64 features, 8 layers, 28x28x1": (
        GatedPixelCnn, (28, 28, 1), {"features": 64, "layers": 8, "hidden": 128, **KERNELS},
    ),
    "`pixel_cnn_tiny`, 28x28x1": (PlainPixelCnn, (28, 28, 1), {"features": 32, "layers": 3, "hidden": 32, **KERNELS}),
}


@torch.no_grad()
def whole_passes(decoder: PixelDecoder, batch: int, passes: int) -> torch.Tensor:
    """The first `passes` values of images drawn without keeping anything."""
    values = torch.zeros(batch, decoder.max_positions(), dtype=torch.long)
    for position in range(passes):
        values[:, position] = draw(decoder(values)[0][:, position])[0]
    return values


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(batch: int, rounds: int) -> Dict[str, List[float]]:
    """Median seconds of both ways by case."""
    torch.manual_seed(1)
    decoders = {
        name: PixelDecoder(Levels(256), network(shape[2], 256, **sizes), shape).eval() for name, (network, shape, sizes) in CASES.items()
    }
    found: Dict[str, List[List[float]]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            kept = seconds(lambda: draw_images(decoder, batch))
            whole = seconds(lambda: whole_passes(decoder, batch, PASSES)) / PASSES * decoder.max_positions()
            found[name].append([whole, kept])
    return {name: [statistics.median(times) for times in zip(*pairs)] for name, pairs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="images side by side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {args.batch} images | a whole pass per value, s | what is known kept, s | ratio |\n|---|---|---|---|")
    for name, (whole, kept) in measure(args.batch, args.rounds).items():
        print(f"| {name} | {whole:.1f} | {kept:.2f} | {whole / kept:.0f} |", flush=True)


if __name__ == "__main__":
    main()
