"""The rule of imports in CONTRIBUTING.md."""
import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fairseq_earm"
FLOORS = {
    "ebm": 1, "sampling": 2, "models": 2, "criterions": 3, "tasks": 3, "reranking": 3, "joint_generation": 3, "evaluation": 3, "cli": 4,
}
# Rooms that may know one beside them: tasks wrap or build their generator, RALM loads its base as samplers do.
NEIGHBOURS = {("tasks", "reranking"), ("tasks", "joint_generation"), ("models", "sampling")}
ANYWHERE = {"errors", "meter_state"} | {path.stem for path in PACKAGE.glob("compat*.py")}


def imported_modules(path):
    """Absolute names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module


def breaches(path, room):
    """Imports of a file that go up, or sideways into another room."""
    found = []
    for module in imported_modules(path):
        parts = module.split(".")
        if room == "ebm" and parts[0] == "fairseq":
            found.append(module)
        if parts[0] != "fairseq_earm" or len(parts) == 1 or parts[1] in ANYWHERE | {room}:
            continue
        if FLOORS[parts[1]] >= FLOORS[room] and (room, parts[1]) not in NEIGHBOURS:
            found.append(module)
    return found


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_down(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else list((PACKAGE / room).glob("*.py"))
    assert files
    assert {str(path): found for path in files if (found := breaches(path, room))} == {}


def test_a_breach_would_be_found(tmp_path):
    guilty = tmp_path / "guilty.py"
    guilty.write_text("from fairseq_earm.cli.tune import main\nimport fairseq.models\nfrom fairseq_earm.errors import UsageError\n")
    assert breaches(guilty, "ebm") == ["fairseq_earm.cli.tune", "fairseq.models"]
    assert breaches(guilty, "criterions") == ["fairseq_earm.cli.tune"]


def test_every_room_is_on_a_floor():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms == set(FLOORS) | ANYWHERE
