"""The house: what may import what, what a wheel holds, what a core install needs."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOMS = ("feature_store", "loader", "pipelines", "trainer")
MAY_IMPORT = {
    "feature_store": {"feature_store"},
    "pipelines": {"pipelines", "feature_store"},
    "loader": {"loader", "feature_store"},
    "trainer": {"trainer", "loader", "feature_store"},
}
HEAVY = {"apache_beam": {"pipelines"}, "torch": {"loader", "trainer"}}


def imports_of(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_in_one_direction(root, room):
    for path in sorted((root / room).glob("*.py")):
        for name in imports_of(path):
            first, _, rest = name.partition(".")
            assert first not in ROOMS, f"{path} imports the bare name {name}"
            if first == "foldfeed" and rest:
                assert rest.split(".")[0] in MAY_IMPORT[room], f"{path} imports {name}"
            if first in HEAVY:
                assert room in HEAVY[first], f"{path} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_cycles_inside_a_room(root, room):
    graph = {
        path.stem: {
            name.split(".")[2]
            for name in imports_of(path)
            if name.startswith(f"foldfeed.{room}.") and name.count(".") >= 2
        }
        - {path.stem}
        for path in (root / room).glob("*.py")
        if path.stem != "__init__"
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle in {room}: {' -> '.join((*trail, module))}"
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_every_room_is_in_the_wheel(root):
    config = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(root) for room in ROOMS for path in (root / room).rglob("__init__.py")}
    assert {"foldfeed." + ".".join(folder.parts) for folder in folders} == set(config["packages"])
    assert config["package-dir"] == {f"foldfeed.{room}": room for room in ROOMS}
    for room in ROOMS:
        assert (root / room / "py.typed").is_file()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_exports_what_it_lists(room):
    module = importlib.import_module(f"foldfeed.{room}")
    assert sorted(module.__all__) == list(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name), f"foldfeed.{room}.__all__ lists {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_bare_names_cannot_be_imported(room, tmp_path):
    """A second copy of a module under a bare name would make classes that are not equal to themselves."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{room}') is not None)"
    assert subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_the_core_needs_neither_beam_nor_torch():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("apache_beam", "torch", "tensorboard"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import foldfeed.feature_store, foldfeed.feature_store.cli, foldfeed.pipelines, foldfeed.pipelines.cli
from click.testing import CliRunner
result = CliRunner().invoke(foldfeed.feature_store.cli.main, ["--help"])
assert result.exit_code == 0 and "build" in result.output, result.output
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


def test_no_file_outgrows_its_room(root):
    long = {
        str(path.relative_to(root)): count
        for folder in (*ROOMS, "tests", "bench", "deploy")
        for path in (root / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    }
    assert long == {}


def test_the_files_that_the_guides_name_are_there(root):
    named = {
        name
        for guide in ("README.md", "CONTRIBUTING.md")
        for name in re.findall(r"`([a-z_]+/[a-z_/.]+\.(?:py|sh))`", (root / guide).read_text())
    }
    assert len(named) > 5
    assert [name for name in sorted(named) if not (root / name).exists()] == []
