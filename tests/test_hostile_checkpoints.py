"""A checkpoint from elsewhere: whatever stands in it, nothing of it is run, and one line says what is wrong."""
import argparse
import ast
import collections
import contextlib
import copy
import functools
import importlib
import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import fairseq
import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary

from fairseq_earm import compat_loading
from fairseq_earm.cli import sample_images
from fairseq_earm.compat_loading import Integers, RefusedCode, checkpoint_types, checks_what_it_loads, evaluate
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation import run_folder
from fairseq_earm.evaluation.translate import own_task
from fairseq_earm.models import energy_init
from fairseq_earm.models.load_energy import load_energy
from fairseq_earm.sampling.frozen import load_frozen
from tests.tiny_language import ARCH, TEXT
from tests.tiny_translation import OPTIMISATION, command

checked = pytest.mark.skipif(not checks_what_it_loads(), reason="torch before 2.6 runs what a pickle tells it to")


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Unknown:
    """A class that no list has."""


def hostile(marker):
    """By name: things that run `touch marker`, or are made of what is allowed in ways that it is not made for."""
    touch = f"touch '{marker}'"
    system = functools.partial(os.system, touch)
    objects = np.array([None, Unknown()], dtype=object)
    return {
        "a command": Call(os.system, touch),
        "eval": Call(eval, f"__import__('os').system({touch!r})"),
        "exec": Call(exec, f"import os; os.system({touch!r})"),
        "getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
        "a partial": system,
        "a call of a partial": Call(system),
        "an iterator of calls": Call(collections.deque, Call(map, os.system, [touch])),
        "torch's own loader": Call(torch.load, str(marker)),
        "a class": Unknown(),
        "a class in an ordered dictionary": collections.OrderedDict(x=Unknown()),
        "a class in a namespace": argparse.Namespace(x=Unknown()),
        "a class in an array": objects,
        "an array of numbers that are no counts": np.array([0.5]),
        "an array of text": np.array(["x"]),
        "a type of records": np.dtype([("a", "O")]),
        "a file mapped": Call(np.memmap, str(marker), "u1", "w+", 0, (1,)),
    }


NAMES = list(hostile("marker"))


def saved(tmp_path, content, legacy=False):
    path = tmp_path / "checkpoint_last.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def checkpoint_of(text):
    return torch.load(text.base, weights_only=False)


def task_of(text):
    dictionary = Dictionary.load(str(text.data / "dict.txt"))
    return argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary, args=argparse.Namespace(data=str(text.data)))


def refusal(read, *arguments, **named):
    with pytest.raises(UsageError) as error:
        read(*arguments, **named)
    line = str(error.value)
    assert "\n" not in line and line.startswith("fairseq-earm: error: ")
    return line


READERS = {
    "--base-lm": lambda path, text: load_frozen(path, task_of(text), flag="--base-lm"),
    "--energy-path": lambda path, text: load_energy(path, task_of(text)),
    "--energy-init": lambda path, text: energy_init._load(path),
    "--path": lambda path, text: sample_images._decoder(path),
    "--model": lambda path, text: own_task(path, str(text.data), flag="--model"),
}


@checked
@pytest.mark.parametrize("name", NAMES)
def test_code_in_a_checkpoint_is_refused(tmp_path, text, name):
    """By everything that reads one, in both of torch's formats; a report says so and goes on."""
    marker = tmp_path / "marker"
    for legacy in (False, True):
        path = saved(tmp_path, {**checkpoint_of(text), "best": hostile(marker)[name]}, legacy)
        for flag, read in READERS.items():
            assert refusal(read, path, text).startswith(f"fairseq-earm: error: {flag} {path}")
        notes = []
        assert run_folder._newest_checkpoint(tmp_path, notes) is None
        assert len(notes) == 1 and notes[0].startswith(f"{path} cannot be read (") and "\n" not in notes[0]
    assert not marker.exists()


@checked
def test_the_line_names_what_the_checkpoint_asks_for(tmp_path, text):
    path = saved(tmp_path, {"model": Call(os.system, "true")})
    assert "asks for posix.system" in refusal(READERS["--base-lm"], path, text)
    with pytest.raises(RefusedCode, match=f"{path} is not read as a checkpoint: it asks for posix.system"):
        checkpoint_utils.load_checkpoint_to_cpu(path)


@checked
@pytest.mark.parametrize("finetune", ["--restore-file", "--finetune-from-model"])
def test_training_does_not_start_from_code(tmp_path, text, finetune):
    marker = tmp_path / "marker"
    path = saved(tmp_path, {**checkpoint_of(text), "best": Call(os.system, f"touch '{marker}'")})
    line = refusal(command, "train", text.data, *TEXT, *ARCH, *OPTIMISATION, "--save-dir", tmp_path / "run", finetune, path)
    assert f"{path} is not read as a checkpoint" in line and not marker.exists()


# --- what a checkpoint may hold -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def allowed(types):
    """Meanwhile only these."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(types)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def name_of(entry):
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__name__}"


def as_numpy(module, content):
    """A checkpoint as a numpy writes it that has `_reconstruct` in this module."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    own = np.zeros(1).__reduce__()[0].__module__.encode()
    renamed = file.getvalue().replace(b"c" + own + b"\n_reconstruct", b"c" + module.encode() + b"\n_reconstruct")
    assert b"c" + module.encode() + b"\n_reconstruct" in renamed
    return io.BytesIO(renamed)


COUNTS = {"args": argparse.Namespace(arch="transformer"), "counts": np.array([[3, 2], [1, 0]])}


@checked
@pytest.mark.parametrize("left_out", map(name_of, checkpoint_types()))
def test_every_entry_of_the_list_is_needed(left_out):
    entries = [entry for entry in checkpoint_types() if name_of(entry) != left_out]
    assert len(entries) == len(checkpoint_types()) - 1

    def load():
        return [torch.load(as_numpy(module, COUNTS), weights_only=True) for module in ("numpy.core.multiarray", "numpy._core.multiarray")]

    for loaded in load():
        assert loaded["args"].arch == "transformer"
        assert loaded["counts"].tolist() == [[3, 2], [1, 0]]
    with allowed(entries), pytest.raises(pickle.UnpicklingError, match=left_out):
        load()


@checked
def test_the_list_holds_what_training_writes_and_nothing_else():
    """`torch` keeps one list for everybody: nothing of the plugin puts more onto it."""
    ours = {entry for entry in torch.serialization.get_safe_globals() if "earm" in str(entry) or "numpy" in str(entry)}
    assert {name_of(entry) for entry in ours} <= {name_of(entry) for entry in checkpoint_types()}


@checked
def test_counts_are_ordinary_arrays_afterwards():
    counts = torch.load(as_numpy("numpy.core.multiarray", COUNTS), weights_only=True)["counts"]
    assert isinstance(counts, Integers) and counts.dtype == np.int64
    assert (counts + 1).sum() == 10 and copy.deepcopy(counts).tolist() == counts.tolist()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(counts, protocol))
        assert type(again) is np.ndarray and again.tolist() == counts.tolist()
    again = torch.load(as_numpy("numpy._core.multiarray", {"counts": counts}), weights_only=True)["counts"]
    assert again.tolist() == counts.tolist()


def raw_pickle(*parts):
    """A checkpoint of these pickle operations."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"".join(parts) + b".")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return io.BytesIO(file.getvalue())


def operations(value):
    """How a value of plain containers is pickled, without the beginning and the end."""
    return pickle.dumps(value, 2)[2:-1]


REBUILT = b"cnumpy.core.multiarray\n_reconstruct\n)R"
INT64 = b"cnumpy\ndtype\nX\x02\0\0\0i8R".replace(b"X\x02\0\0\0i8", operations("i8") + b"\x85")
CONTENT = b"c_codecs\nencode\n" + operations("\0" * 8) + operations("latin1") + b"\x86R"


def array_of(kind=INT64, shape=(1,), content=CONTENT, fortran=False):
    """A pickled array, its state as given."""
    return [REBUILT, b"(", operations(1), operations(shape), kind, operations(fortran), content, b"tb"]


@checked
def test_an_array_as_it_should_be():
    assert torch.load(raw_pickle(*array_of()), weights_only=True).tolist() == [0]


@checked
@pytest.mark.parametrize(
    "operations_",
    [
        # Objects at the addresses that the file names: with numpy's own classes a crash, or worse.
        array_of(INT64 + operations((3, "<", None, ("a",), {"a": (None, 0)}, 8, 1, 0)) + b"b", content=operations([])),
        array_of(INT64 + operations((3, ">", None, None, None, -1, -1, 0)) + b"b"),
        array_of(INT64 + operations(None) + b"b"),
        array_of(b"cnumpy\ndtype\n" + operations("O") + b"\x85R"),
        array_of(b"cnumpy\ndtype\n" + operations("f8") + b"\x85R"),
        array_of(b"cnumpy\ndtype\n" + operations(["i8"]) + b"\x85R"),
        array_of(operations("i8")),
        array_of(shape=(2**60,)),
        array_of(shape=(2**32, 2**32)),
        array_of(shape=(-1,)),
        array_of(shape=(True,)),
        array_of(shape=[1]),
        array_of(content=operations("\0" * 8)),
        array_of(fortran=2),
        [REBUILT, operations((1, 2)), b"b"],
        [REBUILT, operations(None), b"b"],
        [b"cnumpy\nndarray\n", operations(((2**40,),)), b"R"],
        [b"cnumpy\nndarray\n", operations(((2**40,),)), b"\x81"],
        [b"cnumpy\ndtype\n", operations(()), b"R"],
    ],
)
def test_an_array_that_is_none_is_refused(operations_):
    with pytest.raises((pickle.UnpicklingError, ValueError, TypeError)):
        loaded = torch.load(raw_pickle(*operations_), weights_only=True)
        raise AssertionError(repr(loaded))


ELEMENT = int.from_bytes(b"\1" * 8, "little")


def bytes_of(length):
    """So many elements, pickled."""
    return b"c_codecs\nencode\n" + operations("\1" * 8 * length) + operations("latin1") + b"\x86R"


def filled(length, content=None):
    """The state of an array of so many elements, and the operation that sets it."""
    content = content or bytes_of(length)
    return b"(" + operations(1) + operations((length,)) + INT64 + operations(False) + content + b"tb"


ARRAY, KEEP_ARRAY = b"h\x4d", b"q\x4d"
TENSOR, KEEP_TENSOR = b"h\x4e", b"q\x4e"
# Tensors on the array's memory, by torch's own functions.
SHARED = {
    "from_numpy": b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n("
                  + ARRAY + b"ctorch\nint64\n" + operations("cpu") + b"\x89tR" + KEEP_TENSOR,
    "LongTensor": b"ctorch\nLongTensor\n" + ARRAY + b"\x85R" + KEEP_TENSOR,
}
# How an array gets its first state: as numpy writes it, or by a function of torch's.
BEGUN = {
    "large": REBUILT + KEEP_ARRAY + filled(1000),
    "small": REBUILT + KEEP_ARRAY + filled(1),
    "empty": REBUILT + KEEP_ARRAY + filled(0),
    "by torch": b"ctorch._tensor\n_rebuild_from_type_v2\n(cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n)"
                + filled(1000)[:-1] + b"tR" + KEEP_ARRAY,
}


@checked
@pytest.mark.parametrize("sharing", SHARED)
@pytest.mark.parametrize("beginning", BEGUN)
def test_an_array_is_filled_once(tmp_path, text, beginning, sharing):
    """At a second time numpy frees the memory that a tensor stands on."""
    once = [b"]", BEGUN[beginning], b"a", SHARED[sharing], b"a"]
    array, tensor = torch.load(raw_pickle(*once), weights_only=True)
    assert isinstance(array, Integers) and array.tolist() == tensor.tolist()
    twice = raw_pickle(*once, ARRAY, filled(1), b"a")
    with pytest.raises(pickle.UnpicklingError, match="an array that is filled twice"):
        torch.load(twice, weights_only=True)
    (tmp_path / "checkpoint_last.pt").write_bytes(twice.getvalue())
    for flag, read in READERS.items():
        path = str(tmp_path / "checkpoint_last.pt")
        assert refusal(read, path, text).startswith(f"fairseq-earm: error: {flag} {path}")


@checked
@pytest.mark.parametrize("sharing", SHARED)
def test_a_tensor_of_an_array_that_is_filled_later_is_empty(sharing):
    """And stays so; what it stands on is freed by nobody."""
    later = [b"]", REBUILT, KEEP_ARRAY, b"a", SHARED[sharing], b"a", ARRAY, filled(1000), b"a"]
    array, tensor, same = torch.load(raw_pickle(*later), weights_only=True)
    assert array is same and array.tolist() == [ELEMENT] * 1000 and tensor.tolist() == []
    longer = [TENSOR, b"(", TENSOR, operations(0), operations((9,)), operations((1,)), b"tb", b"a"]
    with pytest.raises(RuntimeError, match="not resizable"):
        torch.load(raw_pickle(*later, *longer), weights_only=True)


def test_arrays_without_a_state_stand_on_memory_that_is_never_freed():
    one, other = Integers(), Integers()
    assert one.__array_interface__["data"][0] == other.__array_interface__["data"][0]
    with pytest.raises(pickle.UnpicklingError, match="filled twice"):
        one[:].__setstate__((1, (0,), compat_loading.IntegerType("i8"), False, b""))


@checked
@pytest.mark.parametrize("sharing", SHARED)
def test_an_array_has_its_content_to_itself(sharing):
    """numpy itself lets an array write into the bytes that it was made of."""
    state = filled(1000, b"h\x4c")
    arrays = [REBUILT, state, b"a", REBUILT, KEEP_ARRAY, state, b"a"]
    given = raw_pickle(b"]", bytes_of(1000), b"q\x4c", b"a", *arrays, SHARED[sharing], b"a")
    content, other, array, tensor = torch.load(given, weights_only=True)
    tensor.fill_(7)
    assert content == b"\1" * 8000 and set(other.tolist()) == {ELEMENT}
    del array
    assert set(tensor.tolist()) == {7}


def test_nothing_else_on_the_list_has_memory_to_share():
    kinds = [entry[0] if isinstance(entry, tuple) else entry for entry in checkpoint_types()]
    others = {kind for kind in kinds if isinstance(kind, type)} - {Integers}
    assert others
    for kind in others:
        with pytest.raises(TypeError):
            memoryview(object.__new__(kind))


@checked
def test_a_bare_type_or_array_does_nothing():
    """What the list allows to be made by itself is empty."""
    loaded = torch.load(raw_pickle(b"cnumpy\nndarray\n)\x81"), weights_only=True)
    assert isinstance(loaded, Integers) and loaded.size == 0


# --- what fairseq evaluates of the settings in it -----------------------------------------------------------------------


def fairseq_modules():
    """(name, syntax tree) of fairseq's own modules, its examples left out."""
    folder = Path(fairseq.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] != "examples":
            yield ".".join(["fairseq", *parts]), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree, *names):
    return any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names for node in ast.walk(tree))


def test_no_module_of_fairseq_runs_settings():
    running = [name for name, tree in fairseq_modules() if calls(tree, "eval", "exec")]
    assert "fairseq.utils" in running and len(running) > 10
    assert [name for name in running if vars(sys.modules[name]).get("eval") is not evaluate] == []
    assert [name for name, tree in fairseq_modules() if calls(tree, "exec")] == []


def defaults():
    """Every text that fairseq gives a setting by default which it evaluates."""
    return ["10000,50000", "1", "[1, 2]", "(0.9, 0.98)", "(1e-30, 1e-3)", "[(512, 3)] * 20", "True", "False", "None", "-1", "1e-5,2e-5",
            "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]", "{'a': [1, 'b']}", " [(3, 2 * 4)] ", "()", "'text'",
            "[(64, 3)] * (2 + 1) + [(-1, +1)]", "3 - 1", '(0.1, 0.2) * 2', "{1, 2}", "b'x'"]


@pytest.mark.parametrize("text_", defaults())
def test_settings_are_evaluated_as_python_does(text_):
    assert evaluate(text_) == eval(text_)


@pytest.mark.parametrize(
    "program",
    [
        "__import__('os').system('true')", "().__class__.__base__.__subclasses__()", "[x for x in (1,)]", "(lambda: 1)()", "open('x')",
        "f'{1}'", "print", "1 if 1 else 2", "[*(1, 2)]", "{**{}}", "[1][0]", "'a'.join('b')", "2 ** 9 ** 9", "[0] * 10 ** 9", "1 << 60",
        "[0] * 1000000000", "1000000000 * 'x'", "[[0] * 1000] * 1000 * 10000", "(1).real", "yield", "x := 1", "", "\0", "1;2", "a=1", "[",
        "9" * 5000, "(" * 500 + ")" * 500, "-" * 100000 + "1", "[" * 100000, "1 + " * 50000 + "1", "[] - []", "1 + 'a'", "[1] * 1.5",
    ],
)
def test_programs_are_refused(program):
    with pytest.raises(RefusedCode, match="only numbers, lists and the like are evaluated") as error:
        evaluate(program)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("value", [None, True, 3, ["1"]])
def test_what_is_no_text_is_no_program(value):
    """`eval_bool` relies on it."""
    with pytest.raises(TypeError):
        evaluate(value)


def with_settings(text, **settings):
    """The checkpoint with other settings of its model."""
    state = checkpoint_of(text)
    model = state["cfg"]["model"]
    for name, value in settings.items():
        if isinstance(model, dict):
            model[name] = value
        else:
            setattr(model, name, value)
    return state


@pytest.mark.parametrize(
    "settings",
    [
        {"adaptive_softmax_cutoff": "{}"},
        {"adaptive_input": True, "adaptive_input_cutoff": "{}"},
        {"character_embeddings": True, "character_filters": "{}", "character_embedding_dim": 4, "char_embedder_highway_layers": 1},
        {"_name": "fconv_lm", "arch": "fconv_lm", "decoder_layers": "{}", "decoder_embed_dim": 8, "decoder_attention": "False"},
    ],
)
def test_programs_in_the_settings_of_a_checkpoint_are_not_run(tmp_path, text, settings):
    marker = tmp_path / "marker"
    program = f"__import__('os').system('touch {marker}')"
    filled = {name: program if value == "{}" else value for name, value in settings.items()}
    path = saved(tmp_path, with_settings(text, **filled))
    line = refusal(READERS["--base-lm"], path, text)
    assert line.startswith(f"fairseq-earm: error: --base-lm {path}: ") and "only numbers, lists and the like" in line
    assert not marker.exists()


def test_fairseq_generates_nothing_from_a_program(tmp_path, text):
    marker = tmp_path / "marker"
    path = saved(tmp_path, with_settings(text, adaptive_softmax_cutoff=f"__import__('os').system('touch {marker}')"))
    line = refusal(command, "eval_lm", text.data, "--path", path, "--task", "language_modeling", "--cpu")
    assert "only numbers, lists and the like" in line and not marker.exists()


def test_a_checkpoint_imports_nobodys_code(tmp_path, text):
    """Neither --user-dir that it was trained with, nor a task or a model of a name that is not known."""
    marker = tmp_path / "marker"
    (tmp_path / "hostile_plugin").mkdir()
    (tmp_path / "hostile_plugin" / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\n")
    state = checkpoint_of(text)
    state["cfg"]["common"]["user_dir"] = str(tmp_path / "hostile_plugin")
    path = saved(tmp_path, state)
    assert load_frozen(path, task_of(text), flag="--base-lm").model is not None
    command("eval_lm", text.data, "--path", path, "--task", "language_modeling", "--cpu")
    for group in ("task", "model"):
        state = checkpoint_of(text)
        settings = state["cfg"][group]
        for name in ("_name", group if group == "task" else "arch"):
            if isinstance(settings, dict):
                settings[name] = "hostile_plugin.x"
            else:
                setattr(settings, name, "hostile_plugin.x")
        refusal(READERS["--base-lm"], saved(tmp_path, state), text)
    assert not marker.exists() and "hostile_plugin" not in sys.modules
