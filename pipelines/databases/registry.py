"""The registry: a JSON file that knows search databases by name.

Owns the file. Does not own what a manifest means (`foldfeed.pipelines.manifest`). Invariants: readers see
the old file or the new one; two that add at once lose neither (a lock beside the file).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.databases.spec import DatabaseSpec
from foldfeed.pipelines.errors import ConfigError, RegistryError
from foldfeed.pipelines.manifest import DatabaseManifest
from foldfeed.pipelines.tools.mmseqs_commands import MmseqsOptions

VARIABLE = "FOLDFEED_DATABASES"
_FORMAT = 1


def default_path() -> Path:
    """Returns $FOLDFEED_DATABASES, else ``foldfeed/databases.json`` in the user's folder of data."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "foldfeed" / "databases.json"


class Registry:
    """Manifests in one file.

    Attributes:
      path: of the file, which need not exist.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Takes the file; `default_path` when None."""
        self.path = Path(path) if path is not None else default_path()

    def load(self) -> dict[str, DatabaseManifest]:
        """Returns all manifests by name, sorted; none when there is no file.

        Raises:
          RegistryError: the file is no registry.
        """
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_bytes())
            if content["format"] != _FORMAT:
                raise RegistryError(str(self.path), f"its format is {content['format']!r}, not {_FORMAT}")
            found = [DatabaseManifest.from_json(fields) for fields in content["databases"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RegistryError(str(self.path), f"it is no registry of databases ({error})") from error
        return {manifest.name: manifest for manifest in sorted(found, key=lambda one: one.name)}

    def get(self, name: str) -> DatabaseManifest:
        """Returns one manifest.

        Raises:
          RegistryError: there is none of that name.
        """
        known = self.load()
        if name not in known:
            raise RegistryError(str(self.path), f"it has no database {name!r} ({_listed(known)})")
        return known[name]

    def put(self, manifest: DatabaseManifest, *, replace: bool) -> None:
        """Adds a manifest, or replaces the one of that name.

        Raises:
          RegistryError: the name is taken by other data and ``replace`` is false.
        """
        with self._locked():
            known = self.load()
            there = known.get(manifest.name)
            if there is not None and there.digest != manifest.digest and not replace:
                raise RegistryError(
                    str(self.path),
                    f"database {manifest.name!r} is there with other data, added {there.added}; choose "
                    "another name, or --replace it (results of the old data are never mixed with new ones)",
                )
            known[manifest.name] = manifest
            content = {"format": _FORMAT, "databases": [known[name].to_json() for name in sorted(known)]}
            blobs = open_blobs(self.path.parent)
            blobs.write_atomic(self.path.name, json.dumps(content, indent=1).encode() + b"\n")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(self.path.name + ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def database_of(text: str, registry: Registry) -> DatabaseSpec:
    """Returns the database that ``NAME=PATH[:TOOL]``, or the name of one in a registry, says.

    Options of mmseqs2 stand behind either, with commas before each: ``env,after=uniref30``.

    Raises:
      ConfigError: neither.
      RegistryError: the registry cannot be read.
    """
    name, *words = text.split(",") if "," in text.partition("=")[0] else [text]
    if "=" in name:
        return DatabaseSpec.parse(text)
    known = registry.load()
    if name not in known:
        raise ConfigError(
            f"database {text!r} must be NAME=PATH[:TOOL], e.g. uniref90=/data/uniref90.fasta, or a name in "
            f"the registry {registry.path} ({_listed(known)}); `foldfeed database add` adds one"
        )
    manifest = known[name]
    return DatabaseSpec(
        name=manifest.name,
        paths=manifest.paths,
        tool=manifest.tool,
        manifest=manifest,
        options=MmseqsOptions.parse(words),
    )


def templates_of(text: str, registry: Registry) -> DatabaseSpec:
    """Returns the templates that ``NAME=FASTA,DATES``, or the name of some in a registry, says.

    Raises:
      ConfigError: neither.
      RegistryError: the registry cannot be read.
    """
    if "=" in text:
        return DatabaseSpec.parse_templates(text)
    known = registry.load()
    if text not in known:
        raise ConfigError(
            f"templates {text!r} must be NAME=FASTA,DATES, e.g. pdb=/db/pdb_seqres.txt,/db/dates.tsv, or a "
            f"name in the registry {registry.path} ({_listed(known)}); `foldfeed database add NAME FASTA "
            "DATES --tool hmmsearch` adds one"
        )
    return database_of(text, registry)


def _listed(known: Mapping[str, DatabaseManifest]) -> str:
    return f"it has {', '.join(known)}" if known else "it has none"
