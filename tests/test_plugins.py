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


def session(root, site, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs tests in a new session that finds the foreign plugin."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=250
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_plugin_does_not_take_part(root, tmp_path, what):
    (tmp_path / "foreign_plugin.py").write_text(FOREIGN[what])
    facts = tmp_path / "foreign-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[pytest11]\nforeign = foreign_plugin\n")
    done = session(root, tmp_path, NEEDS_NOTHING, *CUDA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    # Without our options the same plugin is found and ends the session.
    bare = session(root, tmp_path, "-o", "addopts=--import-mode=importlib", NEEDS_NOTHING)
    assert bare.returncode != 0
    assert "the foreign plugin was loaded" in bare.stdout + bare.stderr
