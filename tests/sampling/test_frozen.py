"""Loading a frozen base model for the data of another task."""
import shutil
from argparse import Namespace

import pytest
import torch
from fairseq.data import Dictionary

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling import frozen as frozen_module
from fairseq_earm.sampling.frozen import first_difference, load_frozen
from fairseq_earm.tasks.image_data import Levels
from tests.tiny_images import build_images


def task_of(data):
    dictionary = Dictionary.load(str(data / "dict.txt"))
    return Namespace(source_dictionary=dictionary, target_dictionary=dictionary, args=Namespace(data=str(data)))


def test_a_frozen_model_never_trains(text):
    frozen = load_frozen(str(text.base), task_of(text.data), flag="--base-lm", dtype=torch.bfloat16)
    assert not frozen.model.training
    assert not any(p.requires_grad for p in frozen.model.parameters())
    assert {p.dtype for p in frozen.model.parameters()} == {torch.bfloat16}
    holder = torch.nn.Module()
    holder.base = frozen.to("cpu")
    assert not holder.state_dict() and not list(holder.parameters())


def test_half_precision_on_cpu_needs_a_torch_that_has_it(text, monkeypatch):
    frozen = load_frozen(str(text.base), task_of(text.data), flag="--base-lm", dtype=torch.float16)
    monkeypatch.setattr(frozen_module, "computes_half_on_cpu", lambda: False)
    with pytest.raises(UsageError, match="--base-dtype or --fp16: torch .* float16 on GPUs alone"):
        frozen.to("cpu")
    assert frozen.to("meta") is frozen
    load_frozen(str(text.base), task_of(text.data), flag="--base-lm", dtype=torch.bfloat16).to("cpu")
    monkeypatch.setattr(frozen_module, "computes_half_on_cpu", lambda: True)
    load_frozen(str(text.base), task_of(text.data), flag="--base-lm", dtype=torch.float16).to("cpu")


def test_loading_uses_up_no_random_numbers(text):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_frozen(str(text.base), task_of(text.data), flag="--base-lm")
    assert torch.equal(torch.rand(3), expected)


def changed_data(text, folder, change):
    """The data folder with another dictionary."""
    shutil.copytree(text.data, folder)
    lines = (folder / "dict.txt").read_text().splitlines()
    (folder / "dict.txt").write_text("\n".join(change(lines)) + "\n")
    return task_of(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [lines[1], lines[0], *lines[2:]], "index 4 is"),
        (lambda lines: [*lines, "new 1"], "symbols there"),
    ],
)
def test_another_dictionary_is_refused_with_the_first_difference(text, tmp_path, change, message):
    task = changed_data(text, tmp_path / "data", change)
    with pytest.raises(UsageError, match=message) as error:
        load_frozen(str(text.base), task, flag="--base-lm")
    assert "\n" not in str(error.value) and str(text.base) in str(error.value)


def test_a_model_of_images_is_refused(tmp_path):
    images = build_images(tmp_path)
    task = Namespace(source_dictionary=Levels(8), target_dictionary=Levels(8), args=Namespace(data=str(images.data)))
    with pytest.raises(UsageError, match="--path .*: EarmImageModelingTask has no dictionary of words; give a model of text"):
        load_frozen(str(images.base), task, flag="--path")


def test_what_is_no_checkpoint_is_refused(text, tmp_path):
    with pytest.raises(UsageError, match="--base-lm .*no such file"):
        load_frozen(str(tmp_path / "nothing.pt"), task_of(text.data), flag="--base-lm")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(UsageError, match="--base-lm .*not a checkpoint"):
        load_frozen(str(tmp_path / "text.pt"), task_of(text.data), flag="--base-lm")


def test_a_base_whose_data_has_moved_uses_the_data_given(text, tmp_path):
    state = torch.load(text.base, map_location="cpu", weights_only=False)
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "moved.pt")
    assert load_frozen(str(tmp_path / "moved.pt"), task_of(text.data), flag="--base-lm").model is not None


def test_first_difference():
    one, other = Dictionary(), Dictionary()
    for dictionary, words in ((one, "ab"), (other, "ac")):
        for word in words:
            dictionary.add_symbol(word)
    assert first_difference(one, one) == ""
    assert first_difference(one, other) == "index 5 is 'b' there and 'c' here"
