"""The set-up takes Python 3.12 where it is, then 3.11, then 3.13; what does not run is passed over."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"


def interpreter(path: Path, minor: int, has_venv: bool = True) -> str:
    """Writes a program that is this Python, but for its version; without venv's modules if asked."""
    lines = f"import sys; sys.version_info = (3, {minor}, 7, 'final', 0)"
    if not has_venv:
        lines += "; sys.modules['ensurepip'] = None"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{lines}; exec(sys.argv[1])" "$2"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def bin_folder(tmp_path) -> Path:
    """A folder that is all of PATH: what the script calls, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sh", "sort"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


@pytest.fixture
def find(root, tmp_path, bin_folder):
    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(bin_folder), "HOME": str(tmp_path / "home")} | variables
        words = ["bash", str(root / "deploy" / "find_python.sh")]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)

    return run


def test_the_order_of_versions(find, bin_folder):
    for minor, taken in ((14, None), (13, 13), (11, 11), (12, 12)):
        interpreter(bin_folder / f"python3.{minor}", minor)
        found = find()
        if taken is None:
            assert (found.returncode, found.stdout) == (1, "")
            assert "no Python 3.11, 3.12 or 3.13 found" in found.stderr
        else:
            assert (found.returncode, found.stdout) == (0, f"python3.{taken}\n")


def test_python3_is_known_by_its_version(find, bin_folder):
    interpreter(bin_folder / "python3", 12)
    interpreter(bin_folder / "python3.11", 11)
    assert find().stdout == "python3\n"
    interpreter(bin_folder / "python3", 10)
    assert find().stdout == "python3.11\n"


def test_a_version_of_pyenv_whose_shim_does_not_run(find, tmp_path, bin_folder):
    interpreter(bin_folder / "python3.11", 11)
    (bin_folder / "python3.12").write_text(SHIM)
    (bin_folder / "python3.12").chmod(0o755)
    assert find().stdout == "python3.11\n"
    versions = tmp_path / "home" / ".pyenv" / "versions"
    interpreter(versions / "3.12.9" / "bin" / "python3", 12)
    newest = interpreter(versions / "3.12.10" / "bin" / "python3", 12)
    assert find().stdout == newest + "\n"
    other = interpreter(tmp_path / "pyenv" / "versions" / "3.12.1" / "bin" / "python3", 12)
    assert find(PYENV_ROOT=str(tmp_path / "pyenv")).stdout == other + "\n"


def test_one_with_venv_goes_first(find, bin_folder):
    interpreter(bin_folder / "python3.12", 12, has_venv=False)
    assert find().stdout == "python3.12\n"
    interpreter(bin_folder / "python3.13", 13)
    assert find().stdout == "python3.13\n"


def test_the_one_that_is_named_is_taken_or_refused(find, tmp_path, bin_folder):
    interpreter(bin_folder / "python3.12", 12)
    named = interpreter(tmp_path / "mine" / "python", 13)
    assert find(PYTHON=named).stdout == named + "\n"
    for wrong in (interpreter(tmp_path / "old" / "python", 10), "/nowhere/python"):
        found = find(PYTHON=wrong)
        assert (found.returncode, found.stdout) == (1, "")
        assert found.stderr == f"PYTHON={wrong} is no Python 3.11, 3.12 or 3.13 that runs\n"
