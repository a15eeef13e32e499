"""The ways in: installed, through --user-dir from anywhere, and both at once; and the files that install."""
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from fairseq_earm.compat_versions import FORK, STOCK, unsupported, untested

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "fairseq_earm"


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py tells setuptools."""
    told = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: told.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return told


def python(code, cwd, *arguments):
    """Run code in a fresh Python that knows the plugin only by what the code does."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


# What fairseq's commands do with --user-dir; prints how many of fairseq's criterions and tasks come from the plugin.
IMPORT_USER_DIR = """
import sys
from argparse import Namespace
from fairseq import utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.tasks import TASK_REGISTRY

def ours():
    return [sum(c.__module__.startswith("fairseq_earm.") for c in r.values()) for r in (CRITERION_REGISTRY, TASK_REGISTRY)]

for step in sys.argv[1:]:
    if step == "import":
        import fairseq_earm
    elif step == "path":
        sys.path.insert(0, {root!r})
    else:
        utils.import_user_module(Namespace(user_dir=step))
    print(step, *ours())
""".replace("{root!r}", repr(str(ROOT)))


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([os.path.relpath(PLUGIN, ROOT.parent), PLUGIN, "import"], id="user-dir-then-import"),
        pytest.param(["path", "import", PLUGIN], id="import-then-user-dir"),
    ],
)
def test_every_way_in_registers_everything_once(steps):
    done = python(IMPORT_USER_DIR, ROOT.parent, *steps)
    assert done.returncode == 0, done.stderr
    counts = [line.split()[1:] for line in done.stdout.splitlines() if not line.startswith("path")]
    assert len(counts) == len([step for step in steps if step != "path"])
    assert all(count == counts[0] for count in counts)
    assert all(int(number) >= 1 for number in counts[0])


def test_a_renamed_folder_is_refused_by_name(tmp_path):
    (tmp_path / "earm").symlink_to(PLUGIN)
    done = python(IMPORT_USER_DIR, tmp_path, tmp_path / "earm")
    assert done.returncode != 0
    assert "--user-dir must end in a folder called fairseq_earm, not earm" in done.stderr.splitlines()[-1]


def test_every_folder_with_modules_is_packaged(setup_arguments):
    folders = {module.parent for module in PLUGIN.rglob("*.py")}
    assert set(setup_arguments["packages"]) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_every_command_has_its_function(setup_arguments):
    scripts = setup_arguments["entry_points"]["console_scripts"]
    assert scripts
    for script in scripts:
        module, function = re.fullmatch(r"fairseq-earm-[\w-]+ = ([\w.]+):(\w+)", script).groups()
        assert callable(getattr(__import__(module, fromlist=[function]), function))


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("name, fairseq", [("constraints.txt", FORK), ("constraints-stock.txt", STOCK)])
def test_the_pinned_versions_are_a_row_of_the_support_matrix(name, fairseq, setup_arguments):
    row = {FORK: None, STOCK: None, **pins(name)}
    assert untested(row) is None
    assert unsupported((3, 12) if fairseq == FORK else (3, 9), row) is None
    extras = [extra.split(";")[0] for extra in setup_arguments["extras_require"]["fairseq"]]
    assert f"{fairseq}=={row[fairseq]}" in extras


@pytest.mark.parametrize("answer", ["echo 3.13", "exit 127", "echo 2.7"])
def test_a_python_that_will_not_do_is_refused_in_one_line(tmp_path, answer):
    shim = tmp_path / "python"
    shim.write_text(f"#!/bin/sh\n{answer}\n")
    shim.chmod(0o755)
    done = subprocess.run([ROOT / "install.sh", shim], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"install.sh: {shim} is not a Python from 3.9 to 3.12 that runs here.\n"
