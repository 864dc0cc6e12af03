"""The front door of import: layouts by name, detection, and records in the order of their ids.

Owns the list of layouts and how to recognise them. Does not own any of them. Invariants: one record is in
memory at a time; a bad source becomes a reject and the others go on; two sources of one id are never both
taken.

    >>> found = AlignmentImport("openproteinset/", options=ImportOptions())
    >>> part = write_part(store.url, found, store.settings)
    >>> found.rejects
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.exchange_errors import LayoutError
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.importers.alphafold2 import (
    has_chains,
    is_output_folder,
    scan_alphafold2,
    unifold_files,
)
from foldfeed.feature_store.importers.alphafold3 import is_alphafold3, scan_alphafold3
from foldfeed.feature_store.importers.boltz import ARRAYS, is_boltz_csv, scan_boltz, scan_boltz_csv
from foldfeed.feature_store.importers.chai import SUFFIXES as CHAI_SUFFIXES
from foldfeed.feature_store.importers.chai import scan_chai
from foldfeed.feature_store.importers.colabfold import is_server_folder, scan_server
from foldfeed.feature_store.importers.mmcif import SUFFIXES as MMCIF_SUFFIXES
from foldfeed.feature_store.importers.mmcif import scan_mmcif
from foldfeed.feature_store.importers.openfold import (
    MERGE_ORDER,
    folder_files,
    scan_openfold_db,
    scan_openproteinset,
)
from foldfeed.feature_store.importers.protenix import is_protenix_folder, scan_protenix
from foldfeed.feature_store.importers.rows import ImportOptions
from foldfeed.feature_store.importers.single import scan_single
from foldfeed.feature_store.importers.sources import (
    Found,
    Reject,
    Source,
    plain_name,
    sub_folders,
    walk_files,
)
from foldfeed.feature_store.importers.texts import is_colabfold
from foldfeed.feature_store.parsers.bounded_files import kind_of, read_file, read_head, stem_of
from foldfeed.feature_store.parsers.conventions import STOCKHOLM_SUFFIXES, database_name, is_database_stem
from foldfeed.feature_store.parsers.hit_names import make_id
from foldfeed.feature_store.parsers.npz import NpzFile

AUTO = "auto"
# A look at this many sub-folders tells what a folder of chains is.
MAX_LOOKED_AT = 200
MAX_REASON = 1000
# So many files of an extension are opened to find out what they are.
MAX_SNIFFED_FILES = 20
# Larger files are not opened to find out what they are.
MAX_SNIFFED_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """One way in which others keep alignments.

    Attributes:
      name: as a user types it.
      looks_for: what is recognised, for messages.
      scan: lists its sources.
    """

    name: str
    looks_for: str
    scan: Callable[[Path, ImportOptions], Found]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("a3m", "*.a3m, one file per record", functools.partial(scan_single, "a3m")),
        Layout("a2m", "*.a2m, one file per record", functools.partial(scan_single, "a2m")),
        Layout("sto", "*.sto or *.stk, one file per record", functools.partial(scan_single, "sto")),
        Layout(
            "openproteinset",
            "a folder per chain with uniref90_hits.sto|a3m, bfd_uniclust_hits.a3m, mgnify_hits.sto|a3m",
            scan_openproteinset,
        ),
        Layout("openfold-db", "*.index (JSON) beside *.db", scan_openfold_db),
        Layout(
            "alphafold2",
            "a folder per target with msas/, features.pkl[.gz] or features.npz; *.feature.pkl[.gz]",
            scan_alphafold2,
        ),
        Layout("alphafold3-json", "*.json with 'sequences' (dialect alphafold3)", scan_alphafold3),
        Layout(
            "colabfold",
            "*.a3m whose first line is '#LENGTHS<tab>COPIES'",
            functools.partial(scan_single, "colabfold"),
        ),
        Layout(
            "msa-server", "a folder with uniref.a3m, bfd....a3m or pair.a3m of an MSA server", scan_server
        ),
        Layout("protenix", "a folder per chain with pairing.a3m, non_pairing.a3m", scan_protenix),
        Layout("boltz-csv", "*.csv with the columns key, sequence", scan_boltz_csv),
        Layout("boltz-npz", "*.npz with sequences, deletions, residues", scan_boltz),
        Layout("chai-pqt", "*.aligned.pqt (Parquet)", scan_chai),
        Layout("mmcif", "*.cif, structures; one record per protein chain, without alignment", scan_mmcif),
    )
}


_NAMED_BY_FILES = ("a3m", "a2m", "sto", "colabfold")
_SINGLE = ("a3m", "a2m", "sto", "colabfold", "boltz-csv", "boltz-npz", "chai-pqt")
_MERGED = ("openproteinset", "openfold-db", "alphafold2")
_EFFECTIVE = {
    "id_from": _SINGLE,
    "a2m_columns": ("a2m",),
    "databases": (*_MERGED, "msa-server"),
    "empty_as_no_hits": _MERGED,
    "paired": (*_MERGED, "alphafold3-json", "msa-server"),
    "modified": ("mmcif",),
    "model": ("mmcif",),
}


def detect_layout(path: Path) -> str:
    """Returns the name of the layout that a path holds.

    Raises:
      LayoutError: none is recognised, or several are; the message says what was looked for.
      OSError: it cannot be read.
    """
    if not path.is_dir():
        kind = _kind_of_file(path)
        if kind is None:
            raise _unrecognised(path)
        return kind
    if any(entry.suffix == ".index" and entry.is_file() for entry in path.iterdir()):
        return "openfold-db"
    if is_output_folder(path) or (path.name == "msas" and has_chains(path)):
        return "alphafold2"
    kinds = _kinds_of_folders(path)
    return _only(path, kinds) if kinds else _kind_of_files(path)


def _kinds_of_folders(root: Path) -> dict[str, Path]:
    """Returns the layouts that the folders in a tree make up, each with its first folder."""
    kinds: dict[str, Path] = {}
    pending = [root]
    for _ in range(MAX_LOOKED_AT):
        if not pending:
            break
        folder = pending.pop()
        kind = _kind_of_folder(folder)
        if kind is None:
            pending += reversed(sub_folders(folder))
        else:
            kinds.setdefault(kind, folder)
    return kinds


def _kind_of_folder(folder: Path) -> str | None:
    if is_output_folder(folder) or unifold_files(folder):
        return "alphafold2"
    names = [plain_name(entry.name) for entry in folder.iterdir()]
    if is_server_folder(names):
        return "msa-server"
    if is_protenix_folder(names):
        return "protenix"
    return "openproteinset" if _has_known_databases(folder) else None


def _unrecognised(path: Path) -> LayoutError:
    looked_for = [f"{layout.name}: {layout.looks_for}" for layout in LAYOUTS.values()]
    return LayoutError(
        str(path),
        "it holds no layout that is known; give --layout to say which it is. Looked for:",
        looked_for,
    )


def _has_known_databases(folder: Path) -> bool:
    """Returns whether a folder's alignments are named by databases: a known one, or all as NAME_hits."""
    names = [name for name, _ in folder_files(folder)]
    known = [found is not None and found[0] in MERGE_ORDER for found in map(database_name, names)]
    return bool(names) and (any(known) or all(stem_of(Path(name)).endswith("_hits") for name in names))


def _kind_of_files(root: Path) -> str:
    """Returns the one kind of the files in a tree, from the first of each extension."""
    kinds: dict[str, Path] = {}
    looked_at: Counter[str] = Counter()
    extensions = (".a3m", ".a2m", ".json", ".npz", ".csv", *STOCKHOLM_SUFFIXES, *CHAI_SUFFIXES)
    for path in walk_files(root, extensions):
        extension = kind_of(path)[1]
        looked_at[extension] += 1
        # The first files of an extension speak for the others; a JSON or npz may be something else
        # altogether.
        if looked_at[extension] <= MAX_SNIFFED_FILES:
            kind = _kind_of_file(path)
            if kind is not None:
                kinds.setdefault(kind, path)
    # Structures lie beside the alignments of many tools; alone they are what is meant.
    if not kinds and next(walk_files(root, MMCIF_SUFFIXES), None) is not None:
        return "mmcif"
    if not kinds:
        raise _unrecognised(root)
    return _only(root, kinds)


def _only(root: Path, kinds: dict[str, Path]) -> str:
    """Returns the one kind that was found.

    Raises:
      LayoutError: there are several.
    """
    if len(kinds) > 1:
        raise LayoutError(
            str(root),
            "it holds several layouts; give --layout to say which to import. Found:",
            [f"{kind}: e.g. {example.relative_to(root)}" for kind, example in kinds.items()],
        )
    return next(iter(kinds))


def _kind_of_file(path: Path) -> str | None:
    extension = kind_of(path)[1]
    if extension in STOCKHOLM_SUFFIXES:
        return "sto"
    if extension in CHAI_SUFFIXES:
        return "chai-pqt"
    if extension in MMCIF_SUFFIXES:
        return "mmcif"
    if extension == ".a3m":
        return "colabfold" if is_colabfold(read_head(path, 4096)) else "a3m"
    if extension == ".json":
        return "alphafold3-json" if is_alphafold3(read_head(path)) else None
    if extension == ".csv":
        return "boltz-csv" if is_boltz_csv(read_head(path, 4096)) else None
    if extension == ".npz":
        return _kind_of_npz(path)
    return {".a2m": "a2m", ".index": "openfold-db", ".pkl": "alphafold2"}.get(extension)


def _kind_of_npz(path: Path) -> str | None:
    if path.stat().st_size > MAX_SNIFFED_BYTES:
        return None
    try:
        archive = NpzFile(read_file(path, MAX_SNIFFED_BYTES), path.name, MAX_SNIFFED_BYTES)
    except FoldfeedError:
        # Not an npz at all: some other layout may still be there.
        return None
    if all(name in archive for name in ARRAYS):
        return "boltz-npz"
    return "alphafold2" if "msa" in archive and "deletion_matrix_int" in archive else None


def _check_options(layout: str, options: ImportOptions) -> None:
    """Raises for an option that cannot take effect."""
    default = ImportOptions()
    for name, layouts in _EFFECTIVE.items():
        if getattr(options, name) != getattr(default, name) and layout not in layouts:
            raise ValueError(
                f"{name} has no effect on the layout {layout}, only on {', '.join(layouts)}; leave it out"
            )


def _reason(error: Exception) -> str:
    """Returns an error's text, cut where names in a damaged file make it endless."""
    text = str(error)
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + " ..."


class AlignmentImport:
    """The records that a path holds, as an iterable in increasing order of their ids.

    Attributes:
      layout: name of the layout, detected or given.
      sources: what will be read, sorted by id.
    """

    def __init__(
        self, path: str | os.PathLike[str], layout: str = AUTO, options: ImportOptions | None = None
    ) -> None:
        """Scans a path; reads no alignment yet.

        Args:
          path: a local file or folder.
          layout: one of `LAYOUTS`, or ``auto``.
          options: of the import.
        Raises:
          LayoutError: nothing there, or not that layout.
          ValueError: an unknown layout, or an option that has no effect on this one.
          OSError: it cannot be read.
        """
        root = Path(path)
        if layout != AUTO and layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is not one of {AUTO}, {', '.join(LAYOUTS)}")
        if not root.exists():
            raise LayoutError(str(root), "there is nothing at that path (imports read local files)")
        self.layout = detect_layout(root) if layout == AUTO else layout
        chosen_options = options or ImportOptions()
        _check_options(self.layout, chosen_options)
        self._neff_max_rows = chosen_options.neff_max_rows
        self._scan_rejects: list[Reject] = []
        self._read_rejects: list[Reject] = []
        self._repeated: list[str] = []
        self.sources = self._scan(root, chosen_options)
        if layout == AUTO and root.is_dir():
            self._refuse_bad_guess(root, chosen_options)
        if not self.sources and not self._scan_rejects:
            chosen = LAYOUTS[self.layout]
            raise LayoutError(
                str(root),
                "it holds nothing of this layout. Looked for:",
                [f"{chosen.name}: {chosen.looks_for}"],
            )

    def _refuse_bad_guess(self, root: Path, options: ImportOptions) -> None:
        """Raises where the files found make sense to nobody under the layout that was recognised.

        Raises:
          LayoutError: records would be called after databases, or more sources share an id than not.
        """
        named = [
            one
            for one in self.sources
            if self.layout in _NAMED_BY_FILES
            and is_database_stem(stem_of(Path(one.where)))
            and one.record_id == make_id(stem_of(Path(one.where)))
        ]
        if named and options.id_from in ("auto", "file"):
            reason = f"their records would be called after databases, such as {named[0].record_id!r}"
            examples = [one.where for one in named]
        elif len(self._repeated) > len(self.sources):
            total = len(self._repeated) + len(self.sources)
            reason = f"{len(self._repeated)} of {total} would have the id of another"
            examples = self._repeated
        else:
            return
        raise LayoutError(
            str(root),
            f"it looks like the layout {self.layout}, but {reason}. Say with --layout what it is, and with "
            "--id-from what names its records. Found:",
            examples[:5],
        )

    @property
    def rejects(self) -> list[Reject]:
        """What could not become a record, so far."""
        return self._scan_rejects + self._read_rejects

    @property
    def left_out(self) -> dict[str, int]:
        """Databases that are left out because they are for pairing chains, and of how many sources."""
        return dict(sorted(Counter(name for source in self.sources for name in source.left_out).items()))

    @property
    def renamed(self) -> dict[str, str]:
        """Names of sources that cannot be ids, and the ids that their records get instead."""
        return {one.renamed_from: one.record_id for one in self.sources if one.renamed_from}

    def __len__(self) -> int:
        """Number of sources; as many records come, less the rejects of reading."""
        return len(self.sources)

    def __iter__(self) -> Iterator[MsaRecord]:
        """Reads one record after the other; what cannot be read is added to `rejects`."""
        self._read_rejects = []
        for source in self.sources:
            try:
                record = source.read().with_neff(self._neff_max_rows)
            except (FoldfeedError, OSError) as error:
                self._read_rejects.append(Reject(source.record_id, source.where, _reason(error)))
                continue
            yield record
            # Not held while the next one is read.
            del record

    def _scan(self, root: Path, options: ImportOptions) -> list[Source]:
        taken: dict[str, Source] = {}
        for found in LAYOUTS[self.layout].scan(root, options):
            if isinstance(found, Reject):
                self._scan_rejects.append(found)
            elif found.record_id in taken:
                first = taken[found.record_id].where
                reason = (
                    f"the record id is already that of {first}; choose with --id-from where ids come from"
                )
                self._scan_rejects.append(Reject(found.record_id, found.where, reason))
                self._repeated.append(found.where)
            else:
                taken[found.record_id] = found
        return [taken[record_id] for record_id in sorted(taken)]
