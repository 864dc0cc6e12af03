"""The house: what may import what, what a wheel holds, what a core install needs."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib

import click
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
    for path in sorted((root / room).rglob("*.py")):
        for name in imports_of(path):
            first, _, rest = name.partition(".")
            assert first not in ROOMS, f"{path} imports the bare name {name}"
            if first == "foldfeed" and rest:
                assert rest.split(".")[0] in MAY_IMPORT[room], f"{path} imports {name}"
            if first in HEAVY:
                assert room in HEAVY[first], f"{path} imports {name}"


def module_graph(root, room) -> dict[str, set[str]]:
    """Modules of a package by their dotted names below it, and which of each other they import."""
    paths = {
        ".".join(path.relative_to(root / room).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (root / room).rglob("*.py")
        if path != root / room / "__init__.py"
    }
    prefix = f"foldfeed.{room}."
    return {
        module: {name.removeprefix(prefix) for name in imports_of(path) if name.removeprefix(prefix) in paths}
        # `from foldfeed.x.room import a_module` names the room as well; that loads its docstring only.
        - {module, *(other for other in paths if is_empty(paths[other]))}
        for module, path in paths.items()
        if not is_empty(path)
    }


def is_empty(path) -> bool:
    return path.name == "__init__.py" and len(ast.parse(path.read_text()).body) <= 1


@pytest.mark.parametrize("room", ROOMS)
def test_no_cycles_inside_a_package(root, room):
    graph = module_graph(root, room)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle in {room}: {' -> '.join((*trail, module))}"
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


# The rooms of each package, and files beside them, lowest floor first, as in CONTRIBUTING; one floor does not
# know itself. "": files that are not named here, which stand on the ground and may know each other.
FLOORS = {
    "feature_store": (
        ("",),
        ("format", "storage"),
        ("parsers",),
        ("parsers.mmcif",),
        ("parts",),
        ("index",),
        ("store",),
        ("importers", "exporters", "care", "looking"),
        ("cli",),
    ),
    "pipelines": (
        ("",),
        ("programs",),
        ("fast_scan",),
        ("tools",),
        ("databases", "search_speed"),
        ("build_config", "searches"),
        ("planning",),
        ("records",),
        ("beam",),
        ("building",),
        ("cli", "template"),
    ),
    "loader": (
        ("",),
        ("meters", "order"),
        ("cache",),
        ("reading",),
        ("features",),
        ("samples", "step_work"),
        ("loader",),
        ("speed",),
        ("speed_cli",),
    ),
    "trainer": (
        ("",),
        ("groups", "network"),
        ("config", "elastic", "goodput"),
        ("models",),
        ("gradients", "state"),
        ("export", "training"),
        ("members", "curve"),
        ("cli",),
        ("prove", "__main__"),
    ),
}


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_downwards_only(root, package):
    floor_of = {name: floor for floor, names in enumerate(FLOORS[package]) for name in names}
    graph = module_graph(root, package)
    folders = {
        ".".join(path.parent.relative_to(root / package).parts)
        for path in (root / package).rglob("__init__.py")
    }
    assert folders <= set(floor_of)
    assert set(floor_of) - folders <= set(graph)

    def place_of(module: str) -> str:
        return module if module in floor_of else module.rpartition(".")[0]

    upwards = [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if place_of(module) != place_of(other) and floor_of[place_of(module)] <= floor_of[place_of(other)]
    ]
    assert sorted(upwards) == []


@pytest.mark.parametrize("package", FLOORS)
def test_contributing_draws_every_room(root, package):
    guide = (root / "CONTRIBUTING.md").read_text()
    (drawing,) = re.findall(rf"^`{package}`:\n\n((?:    .*\n)+)", guide, re.MULTILINE)
    drawn = re.findall(r"^    ([a-z_.]+)/ {2,}\S", drawing, re.MULTILINE)
    rooms = [
        name
        for floor in FLOORS[package]
        for name in floor
        if (root / package / name.replace(".", "/")).is_dir()
    ]
    assert [set(drawn), len(drawn)] == [set(rooms) - {""}, len(rooms) - 1]
    floor_of = {name: floor for floor, names in enumerate(FLOORS[package]) for name in names}
    assert sorted(drawn, key=floor_of.__getitem__) == drawn


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
import foldfeed.feature_store, foldfeed.feature_store.cli.main
import foldfeed.pipelines, foldfeed.pipelines.cli.build
from click.testing import CliRunner
result = CliRunner().invoke(foldfeed.feature_store.cli.main.main, ["--help"])
assert result.exit_code == 0 and "build" in result.output, result.output
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


# What takes long to load, and who may wait for it: a person who asks for help waits for nothing.
SLOW = ("apache_beam", "deltalake", "duckdb", "fsspec", "gemmi", "matplotlib", "numpy", "pandas", "pyarrow")
SLOW += ("rich", "torch", "zarr")
MAY_LOAD = {
    "the import": ("import foldfeed.feature_store", ()),
    "--help": ("main(['--help'])", ()),
    "--version": ("main(['--version'])", ()),
    "show": (
        "main(['show', sys.argv[1]])",
        ("deltalake", "duckdb", "fsspec", "numpy", "pandas", "pyarrow", "rich"),
    ),
}


@pytest.mark.parametrize("what", MAY_LOAD)
def test_what_a_command_loads(what, small_store):
    statement, allowed = MAY_LOAD[what]
    code = (
        "import sys\n"
        "from foldfeed.feature_store.cli.main import main\n"
        f"try: {statement}\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"loaded = [name for name in {SLOW!r} if name in sys.modules]\n"
        "print('loaded:', *loaded)"
    )
    if what == "the import":
        code = code.replace("from foldfeed.feature_store.cli.main import main\n", "")
    done = subprocess.run(
        [sys.executable, "-c", code, small_store.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].removeprefix("loaded:").split()
    assert set(loaded) <= set(allowed)


def test_help_says_what_the_commands_say_of_themselves():
    """The list of `foldfeed --help` is written down, so that help loads no command; here all are loaded."""
    root = importlib.import_module("foldfeed.feature_store.cli.main")
    names = root.main.list_commands(None)
    assert {*root.OWN_COMMANDS, *root.SENTENCES} <= set(names)
    for name in root.SENTENCES:
        command = root.main.get_command(None, name)
        assert command.name == name
        assert command.get_short_help_str(500) == click.Command(
            name, help=root.SENTENCES[name]
        ).get_short_help_str(500)


def test_no_file_outgrows_its_room(root):
    long = {
        str(path.relative_to(root)): count
        for folder in (*ROOMS, "tests", "bench", "deploy", "examples")
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
