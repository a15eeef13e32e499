"""Images from the files that data sets come in: MNIST's idx files, CIFAR-10's batches, arrays of numpy."""
from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zlib
from typing import Dict, List, Optional

import numpy as np

from fairseq_earm.errors import UsageError, reason

SPLITS = ("train", "valid", "test")
MNIST = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
CIFAR10 = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CIFAR10_SHAPE = (3, 32, 32)
IDX_IMAGES = 0x00000803  # unsigned bytes, three dimensions
DEFLATED = 1032  # bytes that a byte of a .gz can stand for, at most
LARGEST_BATCH = 1 << 28  # bytes of a batch of CIFAR-10; its own have 31 million
KNOWN = "MNIST's train-images-idx3-ubyte (as it is or .gz), CIFAR-10's data_batch_1 (python or .bin), or one .npz"


def read_image_files(path: str) -> Dict[str, np.ndarray]:
    """The images of a folder or of an .npz file, whatever of `KNOWN` is there.

    Returns:
        uint8 (N, H, W, C) by the name of the split; "train" is always among them.
    Raises:
        UsageError: one line about what is missing or wrong.
    """
    if path.endswith(".npz") and os.path.isfile(path):
        return _read_npz(path)
    if not os.path.isdir(path):
        raise UsageError(f"{path}: there is no such folder; give one with {KNOWN}")
    if _find(path, MNIST["train"], ("", ".gz")):
        return {split: _read_idx(_need(path, name, ("", ".gz"))) for split, name in MNIST.items()}
    if _find(path, CIFAR10["train"][0], ("", ".bin")):
        return {split: _read_cifar10(path, names) for split, names in CIFAR10.items()}
    arrays = sorted(name for name in os.listdir(path) if name.endswith(".npz"))
    if len(arrays) == 1:
        return _read_npz(os.path.join(path, arrays[0]))
    found = f"{len(arrays)} .npz files" if arrays else "none of it"
    raise UsageError(f"{path}: {found} in this folder; give one with {KNOWN}")


def _find(folder: str, name: str, endings) -> List[str]:
    paths = [os.path.join(folder, name + ending) for ending in endings]
    return [path for path in paths if os.path.isfile(path)]


def _need(folder: str, name: str, endings) -> str:
    found = _find(folder, name, endings)
    if not found:
        raise UsageError(f"{folder} has no {' or '.join(name + ending for ending in endings)}: put it beside the other files")
    return found[0]


def _read_idx(path: str) -> np.ndarray:
    """What the header claims is read, and no more: a small .gz can hold any number of bytes."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            header = file.read(16)
            if len(header) < 16 or struct.unpack(">I", header[:4]) != (IDX_IMAGES,):
                raise UsageError(f"{path}: no idx file of images; get it again")
            images, height, width = struct.unpack(">3I", header[4:])
            size = images * height * width
            content = file.read(size + 1) if size <= DEFLATED * os.path.getsize(path) else b""
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error}); get it again") from error
    if len(content) != size or not size:
        raise UsageError(f"{path}: {images} images of {height} x {width} need another number of bytes than it has; get it again")
    return np.frombuffer(content, np.uint8).reshape(images, height, width, 1)


def _read_cifar10(folder: str, names: List[str]) -> np.ndarray:
    parts = [_read_cifar10_batch(_need(folder, name, ("", ".bin"))) for name in names]
    return np.concatenate(parts).reshape(-1, *CIFAR10_SHAPE).transpose(0, 2, 3, 1)


def _read_cifar10_batch(path: str) -> np.ndarray:
    """(N, 3072) colour planes."""
    values = int(np.prod(CIFAR10_SHAPE))
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_BATCH + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error}); get it again") from error
    if path.endswith(".bin"):
        records = np.frombuffer(content, np.uint8)
        data = records.reshape(-1, values + 1)[:, 1:] if records.size % (values + 1) == 0 else None
    else:
        data = _unpickle(content)
    if len(content) > LARGEST_BATCH or data is None or data.ndim != 2 or data.shape[1] != values or not data.size:
        raise UsageError(f"{path}: no batch of CIFAR-10; get it again")
    return data


class _Bytes:
    """An array of bytes in a pickle. numpy's own classes do what a pickle tells them; this one keeps the state for a look at it."""

    def __init__(self, *_):
        self.state = ()

    def __setstate__(self, state):
        self.state = state


class _Type(_Bytes):
    def __init__(self, name=None, *_):
        self.name = name


def _encode(text: str, encoding: str) -> bytes:
    """How old protocols write bytes."""
    return text.encode({"latin1": "latin1"}[encoding])


# Written in Python, it makes no room for what is only claimed to be there.
class _BytesOnly(pickle._Unpickler):
    """A pickle can do anything to its reader; CIFAR-10's hold arrays of bytes."""

    def find_class(self, module: str, name: str):
        # The module of the first moved with numpy 2.
        known = {"_reconstruct": _Bytes, "ndarray": _Bytes, "dtype": _Type}
        if module.split(".")[0] == "numpy" and name in known:
            return known[name]
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"{module}.{name}")


def _unpickle(content: bytes) -> Optional[np.ndarray]:
    """The array "data" of bytes in a pickled dictionary; None where it is something else."""
    try:
        batch = _BytesOnly(io.BytesIO(content), encoding="latin1").load()
        _, shape, kind, by_columns, values = batch.get("data", batch.get(b"data")).state
        if kind.name not in ("u1", b"u1"):
            return None
        values = values.encode("latin1") if isinstance(values, str) else values
        return np.frombuffer(values, np.uint8).reshape(shape, order="F" if by_columns else "C")
    except Exception:  # whatever such a file makes of its reader
        return None


def _read_npz(path: str) -> Dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*SPLITS, "x") if name in file.files}
            names = ", ".join(file.files)
    except Exception as error:  # numpy, zipfile and zlib raise whatever they like
        raise UsageError(f"{path}: no file of numpy.savez ({reason(error)})") from error
    if "x" in arrays and "train" not in arrays:
        arrays = {"train": arrays["x"]}
    arrays.pop("x", None)
    if "train" not in arrays:
        raise UsageError(f"{path} has the arrays {names}: it needs train, and may have valid and test; or one called x")
    return {split: _checked(f"{path}, array {split}", array) for split, array in arrays.items()}


def _checked(name: str, images: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8."""
    if images.dtype != np.uint8:
        raise UsageError(f"{name}: {images.dtype}, and images are uint8, 0 to 255; convert them")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise UsageError(f"{name}: shape {images.shape}, and images are (N, H, W) or (N, H, W, C)")
    if images.ndim == 4 and images.shape[3] > 4:
        raise UsageError(f"{name}: shape {images.shape} would be {images.shape[3]} colours; these come last, as (N, H, W, C): transpose it")
    return images if images.ndim == 4 else images[..., None]
