"""What each output of a pixel model depends on, exactly; one value at a time against the whole image; sizes."""
from argparse import Namespace

import pytest
import torch

from fairseq_earm.errors import UsageError
from fairseq_earm.models.pixel_cnn import GatedPixelCnnModel, PixelCnnModel
from tests.tiny_images import MODELS, tiny_pixel_model

LEVELS = 5


def dependencies(model):
    """(T, T) whether the logits at the first position change with the value at the second, for some image among a few."""
    steps = model.max_positions()
    found = torch.zeros(steps, steps, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        image = torch.randint(LEVELS, (steps,), generator=generator)
        changed = image.repeat(steps, 1)
        changed.fill_diagonal_(0)
        changed += torch.diag((image + 2) % LEVELS)
        with torch.no_grad():
            difference = model(changed)[0] - model(image.unsqueeze(0))[0]
        found |= difference.ne(0).any(-1).t()
    return found


def expected(shape, sees_pixel):
    """The same from a function (rows up, columns to the right) → whether a pixel is seen; colours in their order."""
    height, width, colours = shape
    places = [(row, column, colour) for row in range(height) for column in range(width) for colour in range(colours)]
    table = torch.zeros(len(places), len(places), dtype=torch.bool)
    for k, (row, column, colour) in enumerate(places):
        for t, (other_row, other_column, other_colour) in enumerate(places):
            up, right = row - other_row, other_column - column
            if (up, right) == (0, 0):
                table[k, t] = other_colour < colour
            else:
                table[k, t] = (up, -right) > (0, 0) and sees_pixel(up, right)
    return table


def gated_field(first, kernel, layers):
    """A rectangle above and a stretch to the left: all that is within reach."""
    reach = first // 2 + (layers - 1) * (kernel // 2)
    return lambda up, right: up <= reach + 1 and abs(right) <= reach if up else -right <= reach


def plain_field(first, kernel, layers):
    """As far to the left and up as the kernels add up to; to the right each row up adds one kernel's reach at most.

    The first kernel climbs one row and goes first // 2 to the right. Then each further row up costs a kernel, which goes
    kernel // 2 to the right, as long as there are kernels.
    """
    start, step = first // 2, kernel // 2
    reach = start + layers * step

    def sees(up, right):
        if up == 0:
            return -right <= reach
        return up <= reach and -reach <= right <= start + step * min(up - 1, layers)

    return sees


# Features enough that no rectifier hides what it sees.
WIDE = {"features": 24, "hidden_features": 24}
# Fields larger and smaller than the image, wide enough for the blind spot to show.
SHAPES = [(5, 8, 1), (3, 5, 3), (3, 4, 2)]
SETTINGS = [{"first_kernel": 3, "kernel": 3, "layers": 1}, {"first_kernel": 5, "kernel": 3, "layers": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gated_model_sees_all_and_only_what_comes_before_within_reach(shape, settings):
    model = tiny_pixel_model("gated_pixel_cnn", shape, LEVELS, **WIDE, **settings)
    field = gated_field(settings["first_kernel"], settings["kernel"], settings["layers"])
    assert torch.equal(dependencies(model), expected(shape, field))


@pytest.mark.parametrize("shape", [(4, 6, 1), (3, 4, 3)], ids=str)
def test_with_layers_enough_the_gated_model_sees_everything_before(shape):
    model = tiny_pixel_model("gated_pixel_cnn", shape, LEVELS, layers=5, **WIDE)
    steps = model.max_positions()
    assert torch.equal(dependencies(model), torch.ones(steps, steps).tril(-1).bool())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_plain_model_has_the_known_blind_spot_and_no_other(shape, settings):
    model = tiny_pixel_model("pixel_cnn", shape, LEVELS, **WIDE, **settings)
    field = plain_field(settings["first_kernel"], settings["kernel"], settings["layers"])
    assert torch.equal(dependencies(model), expected(shape, field))


def test_the_blind_spot_stays_with_any_number_of_layers():
    model = tiny_pixel_model("pixel_cnn", (2, 7, 1), LEVELS, layers=8, **WIDE)
    seen = dependencies(model)[7]  # the first pixel of the second row
    assert seen[:7].tolist() == [True, True, False, False, False, False, False]


@pytest.mark.parametrize("shape", [(4, 5, 1), (3, 4, 3), (1, 1, 2), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_one_value_at_a_time_gives_the_logits_of_the_whole_image(name, dtype, tolerance, shape):
    model = tiny_pixel_model(name, shape, LEVELS, first_kernel=5, features=7, hidden_features=8).to(dtype)
    images = torch.randint(LEVELS, (3, model.max_positions()), generator=torch.Generator().manual_seed(2))
    whole = model(images, src_lengths=None)[0]
    assert whole.shape == (3, model.max_positions(), LEVELS) and whole.dtype == dtype
    steps, logits = model.decoder.stepwise(3), []
    for position in range(model.max_positions()):
        logits.append(steps.logits())
        steps.append(images[:, position])
    logits = torch.stack(logits, 1)
    assert not logits.requires_grad and (logits - whole).abs().max() < tolerance
    assert whole.std() > 0.1


def test_values_come_by_rows_then_pixels_then_colours():
    """An image that is moved down by a row, the field being smaller than the image, has the same logits a row further down."""
    model = tiny_pixel_model("gated_pixel_cnn", (4, 3, 2), LEVELS, layers=1)
    images = torch.randint(LEVELS, (2, 24), generator=torch.Generator().manual_seed(3))
    moved = torch.cat([images[:, :6], images[:, :18]], 1)  # one row of 3 pixels of 2 colours down
    logits, after = (model(values)[0] for values in (images, moved))
    assert torch.allclose(after[:, 18:], logits[:, 12:18])


def refused(model=GatedPixelCnnModel, task=None, **flags):
    sizes = {"features": 6, "layers": 2, "hidden_features": 6, "first_kernel": 3, "kernel": 3, "arch": "it", **flags}
    with pytest.raises(UsageError) as error:
        model.build_model(Namespace(**sizes), task or Namespace(image_shape=(2, 2, 3), target_dictionary=range(2)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sizes_that_cannot_be_are_refused():
    assert "--kernel 4: a kernel has a pixel in its middle; give an odd number" in refused(kernel=4)
    assert "--layers 0: give at least 1" in refused(layers=0)
    assert "--features 4" in refused(PixelCnnModel, features=4)
    assert "--arch it is a model of images: give --task earm_image_modeling" in refused(task=Namespace())
