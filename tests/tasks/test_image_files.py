"""Reading images in each of the formats, and one line about whatever is wrong with them."""
import gzip
import os
import pickle
import struct

import numpy as np
import pytest

from fairseq_earm.errors import UsageError
from fairseq_earm.tasks.image_data import Preparation, format_shape, load_images, parse_shape
from fairseq_earm.tasks.image_files import read_image_files


def refused(call, *arguments):
    with pytest.raises(UsageError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def idx(images):
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def some(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_mnist(folder, *, packed, train=30, test=10):
    arrays = {"train-images-idx3-ubyte": some(train, 4, 6), "t10k-images-idx3-ubyte": some(test, 4, 6, seed=1)}
    for name, images in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(images)))
        else:
            (folder / name).write_bytes(idx(images))
    return [images[..., None] for images in arrays.values()]


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path, packed):
    train, test = write_mnist(tmp_path, packed=packed)
    found = read_image_files(str(tmp_path))
    assert found.keys() == {"train", "test"}
    assert np.array_equal(found["train"], train) and np.array_equal(found["test"], test)


def cifar_batches(folder, ending):
    """Five batches of two images and a test batch, each in colour planes; the images in reading order."""
    images = []
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        batch = some(2, 32, 32, 3, seed=number)
        planes = batch.transpose(0, 3, 1, 2).reshape(2, -1)
        if ending == ".bin":
            content = np.concatenate([np.full((2, 1), 7, np.uint8), planes], 1).tobytes()
        else:
            content = pickle.dumps({"batch_label": name, "labels": [1, 2], "data": planes}, protocol=2)
        (folder / (name + ending)).write_bytes(content)
        images.append(batch)
    return np.concatenate(images[:5]), images[5]


@pytest.mark.parametrize("ending", ["", ".bin"])
def test_cifar10(tmp_path, ending):
    train, test = cifar_batches(tmp_path, ending)
    found = read_image_files(str(tmp_path))
    assert np.array_equal(found["train"], train) and np.array_equal(found["test"], test)


class RunsWhenRead:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_batch_that_holds_more_than_arrays_is_not_run(tmp_path):
    cifar_batches(tmp_path, "")
    made = tmp_path / "made"
    content = pickle.dumps({"data": RunsWhenRead(made)}, protocol=2)
    (tmp_path / "data_batch_1").write_bytes(content)
    assert "data_batch_1: no batch of CIFAR-10" in refused(read_image_files, str(tmp_path))
    assert not made.exists()
    pickle.loads(content)
    assert made.exists()


def test_npz_by_file_or_folder(tmp_path):
    arrays = {"train": some(9, 3, 5), "valid": some(4, 3, 5), "test": some(2, 3, 5)}
    np.savez_compressed(tmp_path / "images.npz", **arrays)
    for path in (tmp_path, tmp_path / "images.npz"):
        found = read_image_files(str(path))
        assert all(np.array_equal(found[split], array[..., None]) for split, array in arrays.items())
    np.savez(tmp_path / "images.npz", x=some(9, 2, 2, 3), y=np.arange(9))
    assert {split: array.shape for split, array in read_image_files(str(tmp_path)).items()} == {"train": (9, 2, 2, 3)}


def test_files_that_will_not_do(tmp_path):
    path = str(tmp_path)
    assert "there is no such folder" in refused(read_image_files, path + "/none")
    assert "none of it in this folder; give one with MNIST's" in refused(read_image_files, path)
    np.savez(tmp_path / "a.npz", train=some(3, 2, 2).astype(np.float32))
    assert "array train: float32, and images are uint8" in refused(read_image_files, path)
    np.savez(tmp_path / "a.npz", train=some(3, 2))
    assert "shape (3, 2), and images are (N, H, W)" in refused(read_image_files, path)
    np.savez(tmp_path / "a.npz", train=some(3, 3, 8, 8))
    assert "would be 8 colours; these come last" in refused(read_image_files, path)
    np.savez(tmp_path / "a.npz", pictures=some(3, 2, 2))
    assert "has the arrays pictures: it needs train" in refused(read_image_files, path)
    (tmp_path / "a.npz").write_bytes(b"no archive")
    assert "no file of numpy.savez" in refused(read_image_files, path)
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, some(3, 2, 2))
    assert "no file of numpy.savez" in refused(read_image_files, path)
    np.savez(tmp_path / "b.npz", train=some(3, 2, 2))
    assert "2 .npz files" in refused(read_image_files, path)


def test_broken_idx_files(tmp_path):
    write_mnist(tmp_path, packed=False)
    test = tmp_path / "t10k-images-idx3-ubyte"
    test.write_bytes(test.read_bytes()[:-1])
    assert "10 images of 4 x 6 need another number" in refused(read_image_files, str(tmp_path))
    test.write_bytes(b"labels?")
    assert "no idx file of images" in refused(read_image_files, str(tmp_path))
    test.unlink()
    assert "has no t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz" in refused(read_image_files, str(tmp_path))
    whole = gzip.compress((tmp_path / "train-images-idx3-ubyte").read_bytes())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    assert "cannot be read" in refused(read_image_files, str(tmp_path))
    damaged = bytearray(gzip.compress(some(1, 1000).tobytes()))
    damaged[10] |= 0b110  # a kind of block that there is not
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(bytes(damaged))
    assert "cannot be read (Error -3 while decompressing" in refused(read_image_files, str(tmp_path))


def write_x(folder, count=40):
    images = some(count, 4, 6)
    np.savez(folder / "a.npz", x=images)
    return images[..., None]


def test_splits_are_taken_off_the_end(tmp_path):
    images = write_x(tmp_path)
    found = load_images(str(tmp_path), Preparation())
    assert [len(found[split]) for split in ("train", "valid", "test")] == [32, 4, 4]
    assert np.array_equal(np.concatenate([found[split] for split in ("train", "valid", "test")]), images)
    found = load_images(str(tmp_path), Preparation(train_images=5, valid_images=10, test_images=3))
    assert np.array_equal(found["train"], images[:5]) and np.array_equal(found["valid"], images[27:37])
    assert "--valid-images 40" in refused(load_images, str(tmp_path), Preparation(valid_images=40))


def test_more_training_images_than_there_are(tmp_path, caplog):
    write_x(tmp_path)
    assert len(load_images(str(tmp_path), Preparation(train_images=32))["train"]) == 32 and not caplog.text
    assert len(load_images(str(tmp_path), Preparation(train_images=33))["train"]) == 32
    assert "--train-images 33" in caplog.text and "has 32, all are taken" in caplog.text


def test_a_split_of_the_files_own_is_kept(tmp_path, caplog):
    _, test = write_mnist(tmp_path, packed=True)
    found = load_images(str(tmp_path), Preparation(test_images=4))
    assert np.array_equal(found["test"], test) and len(found["valid"]) == 3
    assert "--test-images 4: no effect" in caplog.text


def test_pixels_are_averaged_and_levels_merged(tmp_path):
    images = write_x(tmp_path)
    small = load_images(str(tmp_path), Preparation(image_downsample=2))["train"]
    assert small.shape[1:] == (2, 3, 1)
    assert small[3, 1, 2, 0] == round(float(images[3, 2:4, 4:6, 0].mean()))
    two = load_images(str(tmp_path), Preparation(image_levels=2))["train"]
    assert np.array_equal(two, images[:32] // 128)
    three = load_images(str(tmp_path), Preparation(image_levels=3))["train"]
    assert set(three.flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"image_levels": 1}, "--image-levels 1: give 2 to 256"),
        ({"image_levels": 257}, "--image-levels 257: give 2 to 256"),
        ({"image_downsample": 0}, "--image-downsample 0: give at least 1"),
        ({"image_downsample": 4}, "has images of 4 x 6; give a divisor of both"),
        ({"train_images": -1}, "--train-images -1"),
        ({"valid_images": 0}, "--valid-images 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    write_x(tmp_path)
    assert message in refused(load_images, str(tmp_path), Preparation(**settings))


def test_splits_of_different_shapes(tmp_path):
    np.savez(tmp_path / "a.npz", train=some(30, 4, 4), test=some(3, 4, 5))
    assert "images of different shapes" in refused(load_images, str(tmp_path), Preparation())


def test_shapes_as_text():
    assert parse_shape("28x27x1") == (28, 27, 1) and format_shape((28, 27, 1)) == "28x27x1"
    for text in ("28x28", "0x1x1", "axbx1"):
        assert f"--image-shape {text}" in refused(parse_shape, text)


def test_real_files(data_dir):
    mnist = read_image_files(str(data_dir / "mnist"))
    assert {split: array.shape for split, array in mnist.items()} == {"train": (60000, 28, 28, 1), "test": (10000, 28, 28, 1)}
    assert mnist["train"].mean() == pytest.approx(33.3, abs=0.1)
    cifar = read_image_files(str(data_dir / "cifar10"))["train"]
    assert cifar.shape == (4000, 32, 32, 3) and cifar.mean() == pytest.approx(120.7, abs=3)
