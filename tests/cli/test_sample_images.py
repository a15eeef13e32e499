"""fairseq-earm-sample for models of images, from flags to a picture."""
import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from matplotlib import image

from fairseq_earm.cli import sample, sample_images
from fairseq_earm.cli.sample_images import image_grid
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.images import draw_images
from tests import tiny_images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_images.build_images(tmp_path_factory.mktemp("pictures"))


def run(*arguments):
    sample.main([str(argument) for argument in arguments])


def pixels(path, width):
    """(H, W, 3) in the file, where each stands several times, so that the picture is about 600 wide."""
    found = np.rint(image.imread(str(path))[..., :3] * 255).astype(np.uint8)
    times = 600 // width
    small = found[::times, ::times]
    assert times > 1 and small.shape[1] == width and np.array_equal(small.repeat(times, 0).repeat(times, 1), found)
    return small


def refused(*arguments):
    with pytest.raises(UsageError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_picture_holds_the_images_that_the_seed_draws(pictures, tmp_path, capsys):
    out = tmp_path / "grid.png"
    run("--path", pictures.base, "--output", out, "--samples", 6, "--columns", 4, "--seed", 3, "--cpu")
    decoder = checkpoint_utils.load_model_ensemble_and_task([str(pictures.base)])[0][0].eval().decoder
    values, log_q = draw_images(decoder, 6, generator=torch.Generator().manual_seed(3))
    grid = pixels(out, 21)
    assert grid.shape == (11, 21, 3)
    fifth = values[4].view(4, 4).numpy() * 255 // 7
    assert np.array_equal(grid[6:10, 1:5], np.repeat(fifth[..., None], 3, 2))
    assert (grid[6:10, 11:] == 255).all() and (grid[:, 5] == 255).all()
    bits = -log_q.mean().item() / np.log(2)
    assert f"grid.png: 6 images of 4x4x1, seed 3, {bits:.3f} bits per dimension" in capsys.readouterr().out


def test_seeds_draw_each_their_own(pictures, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--path", pictures.base, "--output", tmp_path / f"{name}.png", "--seed", seed, "--samples", 5, "--batch-size", 2, "--cpu")
    a, b, c = (pixels(tmp_path / f"{name}.png", 41) for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_no_data_is_needed(pictures, tmp_path):
    state = torch.load(pictures.base, weights_only=False)
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "moved.pt")
    run("--path", tmp_path / "moved.pt", "--output", tmp_path / "grid.png", "--samples", 1, "--cpu")
    assert pixels(tmp_path / "grid.png", 41).shape == (6, 41, 3)


def test_colours_are_red_green_and_blue():
    decoder = tiny_images.tiny_pixel_model(shape=(1, 2, 3), levels=256).decoder
    grid = image_grid(torch.tensor([[10, 20, 30, 40, 50, 60]]), decoder, 1)
    assert grid[1, 1:3].tolist() == [[10, 20, 30], [40, 50, 60]] and grid.shape == (3, 4, 3)


def test_mistakes(pictures, text, tmp_path):
    png = ["--output", tmp_path / "grid.png", "--cpu"]
    assert "there is no such file" in refused("--path", tmp_path / "none.pt", *png)
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "no checkpoint of fairseq-train" in refused("--path", tmp_path / "text.pt", *png)
    assert "is a model of task language_modeling: a PNG takes one of earm_image_modeling" in refused("--path", text.base, *png)
    assert "--samples 0: give at least 1" in refused("--path", pictures.base, *png, "--samples", 0)
    assert "--seed 1" in refused("--path", pictures.base, *png, "--seed", 10**20)
    (tmp_path / "folder.png").mkdir()
    assert "folder.png cannot be written; give another" in refused("--path", pictures.base, "--output", tmp_path / "folder.png")
    assert "there is no folder" in refused("--path", pictures.base, "--output", tmp_path / "no" / "grid.png")
    assert not (tmp_path / "grid.png").exists()
    folder = ["--output", tmp_path / "samples", "--gen-subset", "valid", "--prefix-length", 4, "--sequence-length", 8]
    assert "none of it in this folder" in refused(text.data, "--path", pictures.base, *folder, "--cpu")


def test_a_picture_that_cannot_be_written_after_all(pictures, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image, "imsave", full)
    message = refused("--path", pictures.base, "--output", tmp_path / "grid.png", "--samples", 1, "--cpu")
    assert "grid.png cannot be written: No space left on device; make room" in message and not list(tmp_path.iterdir())


def test_more_images_than_fit_on_the_gpu(pictures, tmp_path, monkeypatch):
    def too_many(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sample_images, "draw_images", too_many)
    message = refused("--path", pictures.base, "--output", tmp_path / "grid.png", "--batch-size", 9, "--cpu")
    assert "--batch-size 9: so many images do not fit on the GPU" in message


def test_an_ending_in_capitals_is_a_picture_too(pictures, tmp_path):
    run("--path", pictures.base, "--output", tmp_path / "GRID.PNG", "--samples", 1, "--cpu")
    assert pixels(tmp_path / "GRID.PNG", 41).shape == (6, 41, 3)


def test_probabilities_that_are_no_numbers_make_no_picture(pictures, tmp_path):
    state = torch.load(pictures.base, weights_only=False)
    state["model"]["decoder.network.head.0.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "broken.pt")
    message = refused("--path", tmp_path / "broken.pt", "--output", tmp_path / "grid.png", "--cpu")
    assert "probabilities are no numbers" in message and not (tmp_path / "grid.png").exists()
