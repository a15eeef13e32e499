"""Images as sequences of values: their splits, and the batches of a pixel model."""
from __future__ import annotations

import logging
from typing import Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch

from fairseq_earm.errors import UsageError
from fairseq_earm.tasks.image_files import read_image_files
from fairseq_earm.tasks.sized_data import SizedDataset

logger = logging.getLogger(__name__)

# Of the training images, where the files have no such split.
SHARE = 10


class Preparation(NamedTuple):
    """What is made of the images in the files.

    Attributes:
        image_levels: that a value has, 256 as it is.
        image_downsample: so many pixels in each direction are averaged to one.
        train_images: the first so many are trained on; 0 for all.
        valid_images, test_images: taken off the end of the training images, where the files have none; None for a tenth.
    """

    image_levels: int = 256
    image_downsample: int = 1
    train_images: int = 0
    valid_images: Optional[int] = None
    test_images: Optional[int] = None


class Levels:
    """The values of a pixel in place of a dictionary: no end-of-sentence, and an index of padding that no value has."""

    def __init__(self, levels: int):
        self.levels = levels

    def __len__(self) -> int:
        return self.levels

    def pad(self) -> int:
        return self.levels


def load_images(path: str, preparation: Preparation) -> Dict[str, np.ndarray]:
    """Images of the splits train, valid and test, uint8 (N, H, W, C) below `image_levels`.

    Raises:
        UsageError: files or settings that will not do.
    """
    _check(preparation)
    images = _with_all_splits(read_image_files(path), preparation, path)
    if preparation.train_images > len(images["train"]):
        logger.warning("--train-images %d: %s has %d, all are taken", preparation.train_images, path, len(images["train"]))
    if preparation.train_images:
        images["train"] = images["train"][: preparation.train_images]
    shapes = {split: array.shape[1:] for split, array in images.items()}
    if len(set(shapes.values())) > 1:
        raise UsageError(f"{path}: images of different shapes in its splits, {shapes}")
    return {split: _prepare(array, preparation, path) for split, array in images.items()}


def _check(preparation: Preparation) -> None:
    if not 2 <= preparation.image_levels <= 256:
        raise UsageError(f"--image-levels {preparation.image_levels}: give 2 to 256")
    if preparation.image_downsample < 1:
        raise UsageError(f"--image-downsample {preparation.image_downsample}: give at least 1")
    for name in ("train_images", "valid_images", "test_images"):
        count = getattr(preparation, name)
        if count is not None and count < (0 if name == "train_images" else 1):
            raise UsageError(f"--{name.replace('_', '-')} {count}: give a number of images, or leave it out")


def _with_all_splits(images: Dict[str, np.ndarray], preparation: Preparation, path: str) -> Dict[str, np.ndarray]:
    total = len(images["train"])
    for split in ("test", "valid"):
        count, flag = getattr(preparation, f"{split}_images"), f"--{split}-images"
        if split in images:
            if count is not None:
                logger.warning("%s %d: no effect, %s has a split of its own", flag, count, path)
            continue
        count = total // SHARE if count is None else count
        left = len(images["train"]) - count
        if count == 0 or left <= 0:
            raise UsageError(f"{flag} {count}: {path} has {total} images for training; give a number that leaves some of them")
        images[split], images["train"] = images["train"][left:], images["train"][:left]
    return images


def _prepare(images: np.ndarray, preparation: Preparation, path: str) -> np.ndarray:
    side = preparation.image_downsample
    count, height, width, colours = images.shape
    if height % side or width % side:
        raise UsageError(f"--image-downsample {side}: {path} has images of {height} x {width}; give a divisor of both")
    if side > 1:
        blocks = images.reshape(count, height // side, side, width // side, side, colours)
        images = np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)
    if preparation.image_levels < 256:
        images = (images.astype(np.uint16) * preparation.image_levels // 256).astype(np.uint8)
    return images


class ImageDataset(SizedDataset):
    """Images as sequences of values, by rows, within them by pixels, then by colours.

    A batch is {"id": (B,), "nsentences", "ntokens": number of values, "net_input": {"src_tokens": (B, T), "src_lengths": (B,)},
    "target": (B, T)}, the target being the input: a pixel model does not see the value that it predicts.

    Args:
        images: uint8 (N, H, W, C).
        shuffle: whether neighbours in the files are kept out of one batch.
    """

    def __init__(self, images: np.ndarray, *, shuffle: bool):
        self.images = images
        self.shuffle = shuffle
        self.sizes = np.full(len(images), int(np.prod(images.shape[1:])))

    def __getitem__(self, index: int) -> dict:
        return {"id": int(index), "values": torch.from_numpy(self.images[index].reshape(-1).astype(np.int64))}

    def collater(self, samples: list) -> dict:
        if not samples:
            return {}
        values = torch.stack([sample["values"] for sample in samples])
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": values.size(0),
            "ntokens": values.numel(),
            "net_input": {"src_tokens": values, "src_lengths": torch.full((values.size(0),), values.size(1))},
            "target": values,
        }


def parse_shape(text: str) -> Tuple[int, int, int]:
    """(height, width, colours) of a text like 28x28x1.

    Raises:
        UsageError: any other text.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--image-shape {text}: give HEIGHTxWIDTHxCOLOURS, such as 28x28x1, or leave it out")
    return tuple(map(int, parts))


def format_shape(shape: Tuple[int, int, int]) -> str:
    """What `parse_shape` reads."""
    return "x".join(map(str, shape))
