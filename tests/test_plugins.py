"""A session loads the plugins that pyproject.toml names and no other; GPU machines bring many more."""

import os
import subprocess
import sys

import pytest

FOREIGN = {
    "raises when it is imported": "raise RuntimeError('the foreign plugin was loaded')\n",
    "warns in every test": (
        "import warnings\n"
        "import pytest\n"
        "@pytest.fixture(autouse=True)\n"
        "def foreign():\n"
        "    warnings.warn('the foreign plugin was loaded', DeprecationWarning)\n"
    ),
}


NEEDS_NOTHING = "tests/test_packaging.py::test_contributing_draws_every_room"
# They run or skip, as CONTRIBUTING says.
CUDA = ("tests/test_loader_cuda.py", "tests/test_trainer_cuda.py")


def session(root, sites, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs tests in a new session that finds the foreign plugins."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(
        [*map(str, sites), *filter(None, [environment.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=250
    )


@pytest.fixture
def sites(tmp_path):
    """A folder of packages for each foreign plugin."""
    for number, source in enumerate(FOREIGN.values()):
        facts = tmp_path / str(number) / f"foreign{number}-1.0.dist-info"
        facts.mkdir(parents=True)
        (facts.parent / f"foreign_plugin{number}.py").write_text(source)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: foreign{number}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[pytest11]\nforeign{number} = foreign_plugin{number}\n")
    return [tmp_path / str(number) for number in range(len(FOREIGN))]


@pytest.mark.slow
def test_foreign_plugins_do_not_take_part(root, sites):
    done = session(root, sites, NEEDS_NOTHING, *CUDA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    # Without our options each of them is found and ends the session.
    for site in sites:
        bare = session(root, [site], "-o", "addopts=--import-mode=importlib", NEEDS_NOTHING)
        assert bare.returncode != 0
        assert "the foreign plugin was loaded" in bare.stdout + bare.stderr
