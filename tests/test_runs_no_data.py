"""Nothing of the package runs what it reads: by its source, with the exceptions and why they are none."""
import ast
from pathlib import Path

import pytest

import fairseq_earm

PACKAGE = Path(fairseq_earm.__file__).parent
# Modules that can run what they read, or a command.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "subprocess", "code", "codeop", "runpy", "pdb"}
NAMES = {"eval", "exec", "compile", "__import__"}
# Calls by the end of their name, with the argument and its value that make them harmless; None: there is none.
CALLS = {
    "torch.load": ("weights_only", "checks_what_it_loads()"), "np.load": ("allow_pickle", "False"), "os.system": None, "os.popen": None,
    "import_module": None, "all_gather_object": None, "broadcast_object_list": None, "all_gather_list": None, "find_class": None,
}
EXCEPTIONS = {
    ("tasks/image_files.py", "import pickle"): "its unpickler, written in Python, knows arrays of bytes and nothing else",
    ("evaluation/run_folder.py", "from pickle import UnpicklingError"): "an error's name",
    ("compat_loading.py", "from pickle import UnpicklingError"): "an error's name",
    ("compat_loading.py", "import_module"): "of fairseq's own packages, by names in the source",
    ("cli/common.py", "import_module"): "of the package's own modules, by names in the source",
    ("compat.py", "broadcast_object_list"): "between the workers of one run, which run the same program anyway",
}


def breaches(tree):
    """What in a source could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"from {node.module} import {', '.join(alias.name for alias in node.names)}"
        elif isinstance(node, ast.Call):
            yield from _call(node)


def _call(node):
    name = ast.unparse(node.func)
    if name in NAMES:
        yield name
    for end, harmless in CALLS.items():
        if name == end or name.endswith(f".{end}"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if harmless is None or given.get(harmless[0]) != harmless[1]:
                yield end
    if any(keyword.arg == "shell" for keyword in node.keywords):
        yield "shell="


def test_nothing_runs_what_it_reads():
    found = {
        (path.relative_to(PACKAGE).as_posix(), breach)
        for path in sorted(PACKAGE.rglob("*.py")) for breach in breaches(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found - EXCEPTIONS.keys() == set()
    assert EXCEPTIONS.keys() - found == set()  # an exception that nothing needs


@pytest.mark.parametrize(
    "guilty, breach",
    [
        ("eval(x)", "eval"), ("exec(x)", "exec"), ("import pickle", "import pickle"), ("from pickle import loads", "from pickle import loads"),
        ("import yaml", "import yaml"), ("torch.load(path)", "torch.load"), ("torch.load(path, weights_only=False)", "torch.load"),
        ("np.load(path)", "np.load"), ("np.load(path, allow_pickle=True)", "np.load"), ("run(x, shell=True)", "shell="),
        ("os.system(x)", "os.system"), ("torch.distributed.all_gather_object(x, y)", "all_gather_object"), ("importlib.import_module(x)", "import_module"),
    ],
)
def test_a_breach_would_be_found(guilty, breach):
    assert list(breaches(ast.parse(guilty))) == [breach]


@pytest.mark.parametrize("innocent", ["model.eval()", "np.load(path, allow_pickle=False)", "torch.load(path, weights_only=checks_what_it_loads())"])
def test_the_harmless_is_not(innocent):
    assert list(breaches(ast.parse(innocent))) == []
