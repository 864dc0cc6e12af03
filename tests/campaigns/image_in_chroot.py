"""Builds a stage of deploy/images/Dockerfile without a container engine: each instruction is run in a chroot.

`debian:bookworm-slim` is a folder that debootstrap made; images of others (Beam's boot, the launcher) are
folders given by `--stage NAME=FOLDER`, with what COPY takes from them. Needs root and debootstrap.

    debootstrap --variant=minbase bookworm base
    python tests/campaigns/image_in_chroot.py --base base --stage beam=FOLDER --work work --target worker
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from dockerfile import Instruction, Stage, parse  # noqa: E402

# What a container gets from its host: how names are resolved, and certificates, which a proxy before the
# registries may need.
RESOLVER = "/etc/resolv.conf"
CHROOT = shutil.which("chroot") or "/usr/sbin/chroot"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
HOST_VARIABLES = ("PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT", "https_proxy", "http_proxy")


class Container:
    """A folder that is being made."""

    def __init__(self, folder: Path, variables: dict[str, str], workdir: str, user: str) -> None:
        self.folder, self.variables, self.workdir, self.user = folder, dict(variables), workdir, user

    def run(self, command: str) -> None:
        # /proc in a mount namespace of its own, which ends with the command.
        line = ["unshare", "--mount", "sh", "-c", 'mount --bind /proc "$0/proc" && exec "$@"']
        line += [
            str(self.folder),
            # By its path: the container's own PATH may lack the folder.
            CHROOT,
            *(["--userspec", self.user] if self.user != "root" else []),
            str(self.folder),
        ]
        line += ["/bin/sh", "-c", f"cd {self.workdir} && {command}"]
        host = {name: os.environ[name] for name in HOST_VARIABLES if name in os.environ}
        host |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), "/tmp/host-certificates.crt")
        started = time.monotonic()
        subprocess.run(line, env={**host, **self.variables, "DEBIAN_FRONTEND": "noninteractive"}, check=True)
        print(f"  {time.monotonic() - started:.1f} s", flush=True)

    def path(self, destination: str) -> Path:
        return self.folder / os.path.join(self.workdir, destination).lstrip("/")


def build(name: str, stages: dict[str, Stage], given: dict[str, Path], work: Path, base: Path) -> Container:
    """Returns a stage, made with the stages before it."""
    stage = stages[name]
    folder = work / name
    if stage.base in stages:
        before = build(stage.base, stages, given, work, base)
        if not folder.exists():
            subprocess.run(["cp", "-a", str(before.folder), str(folder)], check=True)
        container = Container(folder, before.variables, before.workdir, before.user)
    else:
        assert stage.base.startswith("debian:"), f"{stage.base} is no folder; give --stage {name}=FOLDER"
        if not folder.exists():
            subprocess.run(["cp", "-a", str(base), str(folder)], check=True)
        container = Container(
            folder, {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, "/", "root"
        )
    shutil.copy(RESOLVER, folder / "etc" / "resolv.conf")
    shutil.copy(CERTIFICATES, folder / "tmp" / "host-certificates.crt")
    # A run that was ended goes on behind the last instruction that was finished.
    mark = work / f"{name}.done"
    done = int(mark.read_text()) if mark.exists() else 0
    for number, one in enumerate(stage.instructions, 1):
        if number > done or one.name not in ("RUN", "COPY"):
            print(f"{name}: {one.name} {one.text}", flush=True)
            step(one, container, stages, given, work, base)
            mark.write_text(str(max(number, done)))
    (folder / "tmp" / "host-certificates.crt").unlink()
    return container


def step(
    one: Instruction,
    container: Container,
    stages: dict[str, Stage],
    given: dict[str, Path],
    work: Path,
    base: Path,
) -> None:
    """Carries out one instruction."""
    if one.name == "RUN":
        container.run(one.text)
    elif one.name == "ENV":
        container.variables |= one.pairs()
    elif one.name == "WORKDIR":
        container.workdir = one.text
        container.path(".").mkdir(parents=True, exist_ok=True)
    elif one.name == "USER":
        container.user = one.text
    elif one.name == "COPY":
        stage, sources, destination = one.copy()
        if stage is None:
            origin = ROOT
        elif stage in given:
            origin = given[stage]
        else:
            origin = build(stage, stages, given, work, base).folder
        for source in sources:
            take(origin / source.lstrip("/"), container.path(destination), destination.endswith("/"))


def take(source: Path, target: Path, into: bool) -> None:
    if source.is_dir():
        ignore = shutil.ignore_patterns("__pycache__", "*.so") if source.is_relative_to(ROOT) else None
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=ignore)
        return
    target = target / source.name if into else target
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--target", default="worker")
    parser.add_argument("--stage", action="append", default=[], metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    given = {name: Path(folder) for name, _, folder in (text.partition("=") for text in arguments.stage)}
    stages = parse((ROOT / "deploy" / "images" / "Dockerfile").read_text())
    container = build(arguments.target, stages, given, arguments.work, arguments.base)
    size = subprocess.run(["du", "-sm", str(container.folder)], check=True, capture_output=True, text=True)
    print(f"{arguments.target}: {size.stdout.split()[0]} MB in {container.folder}")


if __name__ == "__main__":
    main()
