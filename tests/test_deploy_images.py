"""The worker image, as far as a machine without a container engine can say: every line of the Dockerfile."""

import fnmatch
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from dockerfile import exec_form, parse
from pipelines_data import ROOT

FOLDER = ROOT / "deploy" / "images"
TEXT = (FOLDER / "Dockerfile").read_text()
STAGES = parse(TEXT)
# Where images come from: Docker's own registry (no host), and Google's for the launcher of flex templates.
PUBLIC_BASES = ("apache/", "debian:", "gcr.io/dataflow-templates-base/")


def pinned(name: str) -> str:
    """The version of a distribution in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(f"{name}=="))
    return found.partition("==")[2]


def seen(path: str) -> bool:
    """Whether the builder sees a path of the repository, by the rules of Dockerfile.dockerignore."""
    visible = True
    for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        if rule.removeprefix("!").startswith("**/"):
            hit = any(fnmatch.fnmatch(part, pattern) for part in parts)
        else:
            hit = any(fnmatch.fnmatch("/".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
        visible = rule.startswith("!") if hit else visible
    return visible


def test_every_stage_resolves_and_is_used():
    known = list(STAGES)
    used = set()
    for place, stage in enumerate(STAGES.values()):
        if stage.base in known:
            assert known.index(stage.base) < place
            used.add(stage.base)
        else:
            assert stage.base.startswith(PUBLIC_BASES), stage.base
        for copy in stage.of("COPY"):
            origin = copy.copy()[0]
            if origin is not None:
                assert known.index(origin) < place, f"line {copy.line}"
                used.add(origin)
    assert used | {"template"} == set(known)


def test_every_file_that_is_copied_is_there_and_seen_by_the_builder():
    for stage in STAGES.values():
        for copy in stage.of("COPY"):
            origin, sources, _ = copy.copy()
            for source in sources if origin is None else []:
                assert (ROOT / source).exists(), f"line {copy.line}: {source}"
                files = (ROOT / source).rglob("*.py") if (ROOT / source).is_dir() else [ROOT / source]
                for file in files:
                    assert seen(file.relative_to(ROOT).as_posix()), file
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    sources = {source for copy in STAGES["build"].of("COPY") for source in copy.copy()[1]}
    assert set(packages.values()) <= sources


@pytest.mark.parametrize(
    "path",
    [
        *(
            "demo-output/store/index",
            "tests/conftest.py",
            "deploy/setup.sh",
            ".git/config",
            ".venv/bin/python",
        ),
        *("pipelines/__pycache__/cli.pyc", "pipelines/_scan.so", "data/secret.fasta"),
    ],
)
def test_what_does_not_belong_into_the_image_is_not_seen_by_the_builder(path):
    assert not seen(path)


def test_the_versions_are_those_of_the_constraints():
    beam = pinned("apache-beam")
    assert STAGES["beam"].base == f"apache/beam_python3.11_sdk:{beam}"
    assert "Python :: 3.11" in (ROOT / "pyproject.toml").read_text()
    assert f'apache_beam.__version__ == "{beam}"' in TEXT
    installs = [one.text for one in STAGES["build"].of("RUN") if "pip install" in one.text]
    assert len(installs) == 1
    assert "-c constraints.txt" in installs[0]
    extras = re.search(r"'\.\[([a-z0-9,]+)\]'", installs[0]).group(1).split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(known)
    assert {"pipelines", "dataflow"} <= set(extras)
    # The search programs are part of every result's name: a version of the day would make them all new.
    tools = [word for one in STAGES["worker"].of("RUN") for word in shlex.split(one.text)]
    assert all(any(word.startswith(f"{name}=") for word in tools) for name in ("hmmer", "hhsuite", "mmseqs2"))


def test_the_worker_starts_beams_boot_as_nobody_special():
    for name in ("worker", "template"):
        stage = STAGES[name]
        chain = [*STAGES["worker"].instructions, *(stage.instructions if name == "template" else ())]
        users = [one.text for one in chain if one.name == "USER"]
        assert users
        assert users[-1] not in ("root", "0")
        assert any(f"--uid 1000 {users[-1]}" in one.text for one in chain if one.name == "RUN")
        (entry,) = (exec_form(one.text) for one in chain if one.name == "ENTRYPOINT")
        assert entry == ["/opt/apache/beam/boot"]
        copies = {one.copy()[2]: one.copy()[0] for one in chain if one.name == "COPY"}
        assert copies["/opt/apache/beam"] == "beam"
        variables = {key: value for one in chain if one.name == "ENV" for key, value in one.pairs().items()}
        assert variables["RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT"] == "1"
        assert variables["PATH"].split(":")[0] == "/opt/foldfeed/bin"


def test_the_template_starts_our_launcher():
    (variables,) = (one.pairs() for one in STAGES["template"].of("ENV"))
    ours = {copy.copy()[2]: copy.copy()[1] for copy in STAGES["template"].of("COPY")}
    assert ours[variables["FLEX_TEMPLATE_PYTHON_PY_FILE"]] == ["deploy/dataflow/launcher.py"]


def test_every_run_line_is_shell_that_stops_at_the_first_fault():
    for stage in STAGES.values():
        for run in stage.of("RUN"):
            subprocess.run(["sh", "-n", "-c", run.text], check=True, timeout=10)
            # `a; b` would go on after a failed `a`; -exec ends with an escaped or a plus.
            assert ";" not in re.sub(r"'[^']*'|\"[^\"]*\"", "", run.text), f"line {run.line}"
            if "apt-get install" in run.text:
                assert "--no-install-recommends" in run.text
                assert "rm -rf /var/lib/apt/lists/*" in run.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("FROM debian", "FROM IMAGE AS NAME"),
        ("FROM a AS b\nFROM c AS b", "there twice"),
        ("RUN true", "before FROM"),
        ("FROM a AS b\nADD x y", "'ADD' is none of"),
        ("FROM a AS b\nRUN true \\", "the last line goes on"),
    ],
)
def test_the_reader_of_dockerfiles_refuses_what_it_does_not_know(text, said):
    with pytest.raises(AssertionError, match=said):
        parse(text)


def test_continued_lines_are_one_instruction(tmp_path: Path):
    (stage,) = parse("# x\nFROM a AS b\nRUN one && \\\n    two\n\nUSER c\n").values()
    assert [(one.line, one.name, one.text) for one in stage.instructions] == [
        (3, "RUN", "one && two"),
        (6, "USER", "c"),
    ]
