"""Search databases as the user names them, checked on disk and known by a digest of their content.

Owns the text form ``NAME=PATH[:TOOL]``, AlphaFold 2's order and caps for the names it knows, the checks
before a run and the digest. Does not own searching. Invariant: two databases with equal digests hold equal
data (up to the sampling described at `file_sha256`), so a stored result of one is a result of the other.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.parsers.release_dates import parse_release_dates
from foldfeed.feature_store.storage import Blobs
from foldfeed.feature_store.storage.options import without_secrets
from foldfeed.pipelines.errors import ConfigError, DatabaseError
from foldfeed.pipelines.manifest import DatabaseManifest, file_state
from foldfeed.pipelines.tools import hhblits, hhsearch, hmmsearch, jackhmmer
from foldfeed.pipelines.tools.mmseqs_commands import DEFAULTS, MmseqsOptions
from foldfeed.pipelines.tools.mmseqs_files import NAME as MMSEQS
from foldfeed.pipelines.tools.mmseqs_files import check_fasta_size, is_database, mmseqs_files

TOOLS = (jackhmmer.NAME, hhblits.NAME, MMSEQS)
# What searches templates: sequences of known structures, of which the release dates are known.
TEMPLATE_TOOLS = (hmmsearch.NAME, hhsearch.NAME)

# Place of a known name in the merged alignment; others come after these, in the order given.
# Source: AlphaFold 2 ``data/pipeline.py``: make_msa_features((uniref90_msa, bfd_msa, mgnify_msa)).
MERGE_RANK = {
    "uniref90": 0,
    **dict.fromkeys(("bfd", "small_bfd", "reduced_bfd", "uniclust30", "uniref30"), 1),
    **dict.fromkeys(("bfd_uniclust", "bfd_uniclust30", "bfd_uniref", "bfd_uniref30"), 1),
    "mgnify": 2,
}

# Most rows taken from a tool's alignment, the query counted.
# Source: AlphaFold 2 ``DataPipeline(uniref_max_hits=10000, mgnify_max_hits=501)``.
MAX_HITS = {"uniref90": 10_000, "mgnify": 501}

# Files above this size are sampled, not read whole.
WHOLE_FILE_BYTES = 4 << 30
NUM_SAMPLES = 1024
SAMPLE_BYTES = 1 << 20

# Files of one database; what AlphaFold 3's names can count.
MAX_SHARDS = 99_999

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
HH_PARTS = ("a3m", "hhm", "cs219")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseSpec:
    """A database as the user wrote it.

    Attributes:
      name: e.g. ``uniref90``; decides the place in the merged alignment and the default cap.
      paths: a FASTA file for jackhmmer, or several that are its shards; HH-suite prefixes for hhblits;
        one FASTA file (plain, gzip) or one MMseqs2 database, of sequences or of clusters, for mmseqs2; a
        FASTA file and a table of release dates for hmmsearch, an HH-suite prefix and such a table for
        hhsearch.
      tool: ``jackhmmer``, ``hhblits`` or ``mmseqs2``; ``hmmsearch`` or ``hhsearch`` for templates.
      manifest: of a database from a registry; its files must still be those that were added.
      options: of mmseqs2.
    """

    name: str
    paths: tuple[str, ...]
    tool: str
    manifest: DatabaseManifest | None = None
    options: MmseqsOptions = DEFAULTS

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"database name {self.name!r} must be 1 to 64 of A-Z a-z 0-9 _ . - and start with a letter, "
                "a digit or _"
            )
        if self.tool not in TOOLS + TEMPLATE_TOOLS:
            raise ConfigError(f"database {self.name!r}: tool {self.tool!r} is not one of {', '.join(TOOLS)}")
        if self.searches_templates and len(self.paths) != 2:
            raise ConfigError(
                f"templates {self.name!r}: give a FASTA file and a table of release dates with a comma "
                f"between them, NAME=SEQRES.fasta,DATES.tsv; this is {len(self.paths)} path(s). `foldfeed "
                "database add NAME FOLDER --tool hmmsearch --unpack-to FOLDER` makes both from mmCIF files"
            )
        if not self.paths or not all(self.paths):
            raise ConfigError(f"database {self.name!r}: the path is empty; write NAME=PATH[:TOOL]")
        if self.tool == MMSEQS and len(self.paths) > 1:
            raise ConfigError(
                f"database {self.name!r}: {MMSEQS} searches one FASTA file or database at a time, not "
                f"{len(self.paths)}; give each a name of its own"
            )
        if self.tool != MMSEQS and self.options != DEFAULTS:
            raise ConfigError(f"database {self.name!r}: {self.tool} has no options; only {MMSEQS} has")
        if self.options.after == self.name:
            raise ConfigError(f"database {self.name!r} cannot be searched after itself")
        twice = sorted(path for path, count in collections.Counter(self.paths).items() if count > 1)
        if self.tool == jackhmmer.NAME and twice:
            raise ConfigError(f"database {self.name!r}: {twice[0]!r} is given twice; its hits would be, too")

    @classmethod
    def parse(cls, text: str) -> DatabaseSpec:
        """Returns the database that ``NAME=PATH[:TOOL]`` names; options of mmseqs2 stand behind it.

        Without a tool it is hhblits where ``PATH_a3m.ffdata`` exists, else jackhmmer. PATH may be several
        with commas between them: prefixes that hhblits searches in one run, as AlphaFold 2 does with BFD and
        UniRef30, or FASTA files that together are one database of jackhmmer. ``PATH@16`` means the files
        ``PATH-00000-of-00016`` to ``PATH-00015-of-00016``, as AlphaFold 3 names shards.

        Raises:
          ConfigError: the text has no such form.
        """
        name, equals, path = text.partition("=")
        if not equals:
            raise ConfigError(
                f"database {text!r} must be NAME=PATH[:TOOL], e.g. uniref90=/data/uniref90.fasta"
            )
        if "://" in path:
            raise ConfigError(
                f"database {name!r}: the tools read local files, and {without_secrets(path)!r} is a URL; "
                "copy it with `foldfeed database stage URL --to FOLDER --name NAME`, or give the build "
                "--stage-databases FOLDER"
            )
        stem, colon, tool = path.rpartition(":")
        tool, *words = tool.split(",") if tool.startswith(f"{MMSEQS},") else [tool]
        if colon and tool in TOOLS:
            path = stem
        elif os.path.exists(f"{path.split(',')[0]}_a3m.ffdata"):
            tool = hhblits.NAME
        elif colon and tool and "/" not in tool and os.path.exists(stem) and not os.path.exists(path):
            raise ConfigError(
                f"database {name!r}: tool {tool!r} is not one of {', '.join(TOOLS)}; "
                "write NAME=PATH or NAME=PATH:TOOL"
            )
        else:
            tool = jackhmmer.NAME
        paths = fasta_files(path) if tool == jackhmmer.NAME else tuple(path.split(","))
        return cls(
            name=name,
            paths=tuple(os.path.abspath(part) if part else "" for part in paths),
            tool=tool,
            options=MmseqsOptions.parse(words),
        )

    @classmethod
    def parse_templates(cls, text: str) -> DatabaseSpec:
        """Returns the templates that ``NAME=PATH,DATES[:TOOL]`` names.

        PATH is a FASTA file for hmmsearch, an HH-suite prefix for hhsearch. Without a tool it is hhsearch
        where ``PREFIX_a3m.ffdata`` exists, else hmmsearch.

        Raises:
          ConfigError: the text has no such form.
        """
        name, equals, path = text.partition("=")
        if not equals or "://" in path:
            what = f"a local path, not the URL {without_secrets(path)!r}" if equals else "NAME=FASTA,DATES"
            raise ConfigError(f"templates {name!r} must be {what}, e.g. pdb=/db/pdb_seqres.txt,/db/dates.tsv")
        stem, colon, tool = path.rpartition(":")
        if colon and tool in TEMPLATE_TOOLS:
            path = stem
        elif os.path.exists(f"{path.split(',')[0]}_a3m.ffdata"):
            tool = hhsearch.NAME
        elif colon and tool in TOOLS:
            raise ConfigError(
                f"templates {name!r}: {tool} searches no templates; {' and '.join(TEMPLATE_TOOLS)} do"
            )
        else:
            tool = hmmsearch.NAME
        paths = tuple(os.path.abspath(part) if part else "" for part in path.split(","))
        return cls(name=name, paths=paths, tool=tool)

    @property
    def searches_templates(self) -> bool:
        """Whether it is a database of templates, which makes no rows of alignments."""
        return self.tool in TEMPLATE_TOOLS

    @property
    def merge_rank(self) -> int:
        """Place in the merged alignment; databases of equal rank keep the order given."""
        return MERGE_RANK.get(self.name.lower(), max(MERGE_RANK.values()) + 1)

    @property
    def default_max_hits(self) -> int | None:
        """AlphaFold 2's cap for this name, the query counted; None where it has none."""
        return MAX_HITS.get(self.name.lower())

    def files(self) -> tuple[str, ...]:
        """Returns the files of the database, after checking that a tool could open them.

        Raises:
          DatabaseError: missing, empty or of another kind.
        """
        if self.tool == jackhmmer.NAME:
            for path in self.paths:
                _check_fasta(self.name, path)
            return self.paths
        if self.tool == MMSEQS:
            return _mmseqs_files(self.name, self.paths[0])
        if self.searches_templates:
            _check_dates(self.name, self.paths[1])
            if self.tool == hhsearch.NAME:
                return (*_hh_files(self.name, self.paths[0]), self.paths[1])
            _check_fasta(self.name, self.paths[0])
            return self.paths
        return tuple(file for prefix in self.paths for file in _hh_files(self.name, prefix))


def in_merge_order(specs: Sequence[DatabaseSpec]) -> tuple[DatabaseSpec, ...]:
    """Returns databases in the order in which their rows enter the merged alignment."""
    return tuple(sorted(specs, key=lambda spec: spec.merge_rank))


def fasta_files(text: str) -> tuple[str, ...]:
    """Returns the files that the path of a FASTA database names; one that exists is itself."""
    if os.path.exists(text):
        return (text,)
    paths = []
    for one in text.split(","):
        stem, _, count = one.rpartition("@")
        if stem and count.isdecimal() and int(count) > 0 and not os.path.exists(one):
            if int(count) > MAX_SHARDS:
                raise ConfigError(f"{one!r} names {count} files; a database has at most {MAX_SHARDS}")
            paths += [f"{stem}-{number:05d}-of-{int(count):05d}" for number in range(int(count))]
        else:
            paths.append(one)
    return tuple(paths)


def _require_file(name: str, path: str) -> None:
    if not os.path.exists(path):
        raise DatabaseError(name, path, "no such file; give --database NAME=PATH with an existing database")
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        raise DatabaseError(name, path, "it is not a readable file")


def _mmseqs_files(name: str, path: str) -> tuple[str, ...]:
    if is_database(path):
        return mmseqs_files(name, path)
    _require_file(name, path)
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"\x28\xb5\x2f\xfd":
        raise DatabaseError(name, path, f"{MMSEQS} reads FASTA plain or as gzip, not Zstandard; unpack it")
    if not magic.startswith(b"\x1f\x8b"):
        _check_fasta(name, path)
    check_fasta_size(name, path)
    return (path,)


def _check_fasta(name: str, path: str) -> None:
    _require_file(name, path)
    with open(path, "rb") as file:
        head = file.read(4096).lstrip()
    if not head:
        raise DatabaseError(name, path, "the file is empty")
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        raise DatabaseError(
            name, path, "the file is compressed; jackhmmer reads plain FASTA, so decompress it"
        )
    if not head.startswith(b">"):
        raise DatabaseError(name, path, "it does not start with '>', so it is no FASTA file")


def _check_dates(name: str, path: str) -> None:
    """Refuses what is no table of release dates by its first lines; reading all of it would take a second."""
    _require_file(name, path)
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.lstrip().startswith(b"{"):
        return
    try:
        # The last line may be cut.
        parse_release_dates(head if len(head) < 4096 else head[: head.rfind(b"\n") + 1])
    except AlignmentParseError as error:
        raise DatabaseError(name, path, f"it is no table of release dates: {error}") from error


def _hh_files(name: str, prefix: str) -> list[str]:
    required = [f"{prefix}_{part}.{kind}" for part in ("a3m", "cs219") for kind in ("ffdata", "ffindex")]
    missing = [file for file in required if not os.path.exists(file)]
    if missing:
        raise DatabaseError(
            name,
            prefix,
            f"no HH-suite database: {missing[0]!r} does not exist; give the prefix before '_a3m.ffdata'",
        )
    files = [f"{prefix}_{part}.{kind}" for part in HH_PARTS for kind in ("ffdata", "ffindex")]
    present = [file for file in files if os.path.exists(file)]
    for file in present:
        _require_file(name, file)
        if os.path.getsize(file) == 0:
            raise DatabaseError(name, prefix, f"{os.path.basename(file)!r} is empty")
    return present


def database_digest(spec: DatabaseSpec, cache: Blobs | None = None, *, check: bool = False) -> str:
    """Returns the sha256 (hex) of a database's manifest: tool, file names, sizes and content hashes.

    The folder is not part of it, so the same files elsewhere are the same database.

    Args:
      spec: the database; its files are checked first.
      cache: where content hashes are remembered by (path, size, modification time, inode), because reading
        hundreds of gigabytes for every build would cost more than the searches.
      check: read the files anyway, and remember what they hold now.
    Raises:
      DatabaseError: see `DatabaseSpec.files`.
    """
    digest = digest_of(spec.tool, _contents(spec, cache, check))
    if spec.manifest is not None and digest != spec.manifest.digest:
        raise DatabaseError(
            spec.name,
            ",".join(spec.paths),
            f"its files are not those that were added on {spec.manifest.added}; `foldfeed database verify "
            f"{spec.name}` says which, `foldfeed database add --replace` takes the new ones",
        )
    return digest


def shard_digests(spec: DatabaseSpec, cache: Blobs | None = None) -> list[str]:
    """Returns the digest of every file by its content alone; after `database_digest` it reads nothing.

    The name is left out: a release that takes over files of the one before may number them anew.
    """
    return [
        shard_digest_of(spec.tool, num_bytes, sha256)
        for _, num_bytes, sha256 in _contents(spec, cache, False)
    ]


def _contents(spec: DatabaseSpec, cache: Blobs | None, check: bool) -> list[tuple[str, int, str]]:
    """Returns every file's path, size and content hash."""
    known = {file.path: file for file in spec.manifest.files} if spec.manifest is not None else {}
    contents = []
    for path in spec.files():
        file = known.get(path)
        unchanged = file is not None and not check and file.state == file_state(path)
        sha256 = file.sha256 if unchanged and file is not None else cached_sha256(path, cache, check)
        contents.append((path, os.path.getsize(path), sha256))
    return contents


def shard_digest_of(tool: str, num_bytes: int, sha256: str) -> str:
    """Returns the digest of one file of a database, whatever its name."""
    return digest_of(tool, [("shard", num_bytes, sha256)])


def digest_of(tool: str, contents: Sequence[tuple[str, int, str]]) -> str:
    """Returns the sha256 (hex) of a tool and every file's (path, size, content hash), without folders."""
    named = [(os.path.basename(path), num_bytes, sha256) for path, num_bytes, sha256 in contents]
    return hashlib.sha256(json.dumps([tool, named]).encode()).hexdigest()


def cached_sha256(path: str, cache: Blobs | None, check: bool) -> str:
    """Returns the content hash of a file, from a cache where it is known there.

    In the cache one file holds one hash, so that writers never meet.
    """
    if cache is None:
        return file_sha256(path)
    key = file_state(path)
    name = f"digests/{hashlib.sha256(key.encode()).hexdigest()}.json"
    if not check and cache.exists(name):
        return json.loads(cache.read(name))["sha256"]
    digest = file_sha256(path)
    # A file that changed while it was read has a hash of nothing that ever was.
    if file_state(path) == key:
        cache.write_atomic(name, json.dumps({"file": key, "sha256": digest}).encode())
    return digest


def file_sha256(path: str | Path) -> str:
    """Returns a content hash (hex) of a file.

    Up to `WHOLE_FILE_BYTES` it is the file's sha256. A larger file is sampled: `NUM_SAMPLES` blocks of
    `SAMPLE_BYTES`, evenly spaced with the first and the last block among them, hashed with the size. A
    release that differs only outside all samples and has the same size would not be noticed; real releases
    differ in size.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if size <= WHOLE_FILE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"sampled {size} {NUM_SAMPLES} {SAMPLE_BYTES}".encode())
        for sample in range(NUM_SAMPLES):
            file.seek((size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()
