"""AlphaFold 2: output folders (``msas/``) and feature files (``features.pkl``, ``features.npz``).

    TARGET/msas/uniref90_hits.sto ...           a monomer: record TARGET
    TARGET/msas/A/uniref90_hits.sto ...         a multimer: records TARGET_A, TARGET_B, ...
    TARGET/features.pkl[.gz], features.npz      used where TARGET has no msas/
    CHAIN.feature.pkl[.gz]                      as Uni-Fold writes them, deletions as a sparse matrix

The pickles are not executed (`foldfeed.feature_store.parsers.pickle`). Owns the meaning of the feature
dictionary: HHblits codes, one row per alignment row, species, labels. Features do not say which database a
row came from, so they become one database called ``features``; nor how the author numbered the residues.

Source: AlphaFold 2 ``run_alphafold.py``, ``data/pipeline.py``, ``data/pipeline_multimer.py``; Uni-Fold
``data/utils.py`` compress_features.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.exchange_errors import SourceFileError, UnsupportedSourceError
from foldfeed.feature_store.format.columns import RELEASE_DATE
from foldfeed.feature_store.format.record import MAX_DELETION, MsaRecord
from foldfeed.feature_store.importers.labels import structure_of_labels
from foldfeed.feature_store.importers.openfold import folder_files, left_out_of, merge_files
from foldfeed.feature_store.importers.rows import TOOL, DatabaseRows, ImportOptions, build_record, check_depth
from foldfeed.feature_store.importers.sources import (
    Found,
    Reject,
    Source,
    load_json,
    name_of_file,
    relative,
    source_of,
    sub_folders,
)
from foldfeed.feature_store.parsers.alignment import ParsedAlignment
from foldfeed.feature_store.parsers.bounded_files import COMPRESSED_SUFFIXES, kind_of, read_file, stem_of
from foldfeed.feature_store.parsers.conventions import HHBLITS_CODES
from foldfeed.feature_store.parsers.hit_names import fit_species, make_id
from foldfeed.feature_store.parsers.npz import NpzFile
from foldfeed.feature_store.parsers.pickle import load_pickled_arrays

HHBLITS_LETTERS = np.frombuffer(HHBLITS_CODES.encode(), dtype=np.uint8)
FEATURE_NAMES = (
    "features.pkl",
    "features.pkl.gz",
    "features.npz",
    *(f"features.npz{suffix}" for suffix in COMPRESSED_SUFFIXES),
)

# Uni-Fold's: row, col and data of the cells that are not zero, and shape.
SPARSE_DELETIONS = "sparse_deletion_matrix_int"
# And what it puts behind the name of a chain.
UNIFOLD_SUFFIX = ".feature"

_FEATURES = (
    "sequence",
    "msa",
    "deletion_matrix_int",
    "domain_name",
    "msa_species_identifiers",
    "msa_uniprot_accession_identifiers",
    "all_atom_positions",
    "all_atom_mask",
    "resolution",
    "release_date",
)
_COMPLEX_FEATURES = ("asym_id", "assembly_num_chains", "entity_id")


def scan_alphafold2(root: Path, options: ImportOptions) -> Found:
    """Yields the records of one output folder, of a folder of them, or of one feature file."""
    if not root.is_dir():
        # Every features.pkl has the same name; its folder says whose it is.
        name = root.resolve().parent.name if stem_of(root) == "features" else _plain(root, options)
        yield _feature_source(root, root, name, options)
        return
    if root.name == "msas" and has_chains(root):
        root = root.resolve().parent
    if is_output_folder(root):
        yield from _scan_target(root, root, options)
        return
    for path in unifold_files(root):
        yield _feature_source(path, root, _plain(path, options), options)
    for folder in sub_folders(root):
        if is_output_folder(folder):
            yield from _scan_target(folder, root, options)


def unifold_files(folder: Path) -> list[Path]:
    """Returns the feature files ``CHAIN.feature.pkl[.gz]`` of a folder, sorted."""
    return sorted(
        path
        for path in folder.iterdir()
        if kind_of(path)[1] == ".pkl" and stem_of(path).endswith(UNIFOLD_SUFFIX) and path.is_file()
    )


def _plain(path: Path, options: ImportOptions) -> str:
    return name_of_file(path, options).removesuffix(UNIFOLD_SUFFIX)


def has_chains(msas: Path) -> bool:
    """Returns whether a folder looks like ``msas/``: alignments of one chain, or of chains in A, B, ..."""
    return any(not name or len(name) == 1 for name in _chain_folders(msas))


def is_output_folder(folder: Path) -> bool:
    """Returns whether a folder is AlphaFold 2's output for one target."""
    return (folder / "msas").is_dir() or any((folder / name).is_file() for name in FEATURE_NAMES)


def _scan_target(folder: Path, root: Path, options: ImportOptions) -> Found:
    target = folder.resolve().name
    chains = _chain_folders(folder / "msas") if (folder / "msas").is_dir() else {}
    if not chains:
        for name in FEATURE_NAMES:
            if (folder / name).is_file():
                yield _feature_source(folder / name, root, target, options)
                return
        yield Reject(
            make_id(target),
            relative(folder, root),
            "its msas/ folder holds no alignment and there are no features",
        )
        return
    try:
        descriptions = _descriptions(folder / "msas" / "chain_id_map.json", options)
    except (FoldfeedError, OSError) as error:
        yield Reject(make_id(target), relative(folder, root), str(error))
        return
    for chain, chain_folder in chains.items():
        name = f"{target}_{chain}" if chain else target
        where = relative(chain_folder, root)
        facts = {"source": where, "source_format": "alphafold2"}
        files = folder_files(chain_folder)
        description = descriptions.get(chain, "")
        read = functools.partial(
            merge_files, files=files, options=options, description=description, extra=facts
        )
        left_out = left_out_of((file for file, _ in files), options)
        yield source_of(name, where, read, left_out)


def _chain_folders(msas: Path) -> dict[str, Path]:
    """Returns the folders with alignments: ``msas`` itself under "", or its chains by their letter."""
    if folder_files(msas):
        return {"": msas}
    return {folder.name: folder for folder in sub_folders(msas) if folder_files(folder)}


def _descriptions(path: Path, options: ImportOptions) -> dict[str, str]:
    if not path.is_file():
        return {}
    chains = load_json(read_file(path, options.max_bytes), path.name, max_items=100_000)
    if not isinstance(chains, dict):
        raise SourceFileError(path.name, "a map of chains is a JSON object")
    return {
        chain: facts["description"]
        for chain, facts in chains.items()
        if isinstance(facts, dict) and isinstance(facts.get("description"), str)
    }


def _feature_source(path: Path, root: Path, name: str, options: ImportOptions) -> Source:
    where = relative(path, root)
    return source_of(name, where, functools.partial(_read_features, path, where, options))


def _read_features(path: Path, where: str, options: ImportOptions, record_id: str) -> MsaRecord:
    data = read_file(path, options.max_bytes)
    features: Mapping[str, Any]
    if kind_of(path)[1] == ".npz":
        archive = NpzFile(data, where, options.max_bytes)
        if any(name in archive for name in _COMPLEX_FEATURES):
            raise _complex()
        features = {name: archive[name] for name in _FEATURES if name in archive}
    else:
        features = load_pickled_arrays(data, where)
    facts = {"source": where, "source_format": "alphafold2"}
    return record_of_features(record_id, features, where, options, facts)


def _deletions(features: Mapping[str, Any], where: str) -> NDArray[Any]:
    """Returns the deletion counts, integers (depth, length).

    Raises:
      SourceFileError: they are not there, or have another shape, dtype or range.
    """
    if SPARSE_DELETIONS not in features:
        return _integers(features, "deletion_matrix_int", where, MAX_DELETION)
    sparse = features[SPARSE_DELETIONS]
    shape = sparse.get("shape") if isinstance(sparse, dict) else None
    msa = features.get("msa")
    if not isinstance(msa, np.ndarray) or not isinstance(shape, tuple) or shape != msa.shape:
        raise SourceFileError(
            where, f"feature {SPARSE_DELETIONS!r} must be a dictionary whose 'shape' is that of msa"
        )
    parts = {}
    for name, largest in (("row", shape[0] - 1), ("col", shape[1] - 1), ("data", MAX_DELETION)):
        parts[name] = _integers(sparse, name, where, largest, num_axes=1)
    if len({len(values) for values in parts.values()}) != 1:
        raise SourceFileError(where, f"row, col and data of {SPARSE_DELETIONS!r} must have one length")
    dense = np.zeros(shape, dtype=np.int32)
    # Cells that come twice add up, as in the matrices of SciPy that Uni-Fold takes apart.
    np.add.at(dense, (parts["row"], parts["col"]), parts["data"].astype(np.int32))
    return dense


def _complex() -> UnsupportedSourceError:
    return UnsupportedSourceError(
        "these are the features of a complex, whose rows are paired and padded; records hold one chain "
        "each, so "
        "import the chains from its msas/ folder"
    )


def record_of_features(
    record_id: str, features: Mapping[str, Any], where: str, options: ImportOptions, extra: Mapping[str, str]
) -> MsaRecord:
    """Returns the record of AlphaFold 2's feature dictionary of one chain.

    Args:
      record_id: its id.
      features: ``sequence`` (1,), ``msa`` (depth, length) integers in HHblits codes, ``deletion_matrix_int``
        of the same shape, or Uni-Fold's ``sparse_deletion_matrix_int``; ``msa_species_identifiers``
        (depth,) and ``domain_name`` (1,) where they are; and the labels ``all_atom_positions`` (length, 37,
        3), ``all_atom_mask`` (length, 37), ``resolution`` (1,), ``release_date`` (1,) where they are.
      where: for messages.
      options: of the import.
      extra: further facts.
    Raises:
      SourceFileError: a feature is missing or has another shape, dtype or range.
      UnsupportedSourceError: features of a complex.
      InvalidRecordError: the store cannot hold the record.
    """
    if any(name in features for name in _COMPLEX_FEATURES):
        raise _complex()
    msa = _integers(features, "msa", where, len(HHBLITS_LETTERS) - 1)
    deletions = _deletions(features, where)
    if deletions.shape != msa.shape or msa.shape[0] < 1 or msa.shape[1] < 1:
        raise SourceFileError(
            where, f"msa {msa.shape} and deletion_matrix_int {deletions.shape} must be equal and not empty"
        )
    check_depth(len(msa), where)
    sequence = _text(features, "sequence", where)
    letters = HHBLITS_LETTERS[msa.astype(np.intp)]
    depth = len(letters)
    species = [fit_species(name) for name in _texts(features, "msa_species_identifiers", depth, where)]
    rows = DatabaseRows(
        name="features",
        alignment=ParsedAlignment.dense([""] * depth, letters, deletions.astype(np.int32)),
        hit_ids=_texts(features, "msa_uniprot_accession_identifiers", depth, where),
        e_values=np.full(depth, np.nan),
        bit_scores=np.full(depth, np.nan, dtype=np.float32),
        species=species,
        tool=TOOL,
    )
    description = _text(features, "domain_name", where) if "domain_name" in features else ""
    # An export of a record without a description has its id there, as AlphaFold 2 has the FASTA header's.
    description = "" if description == record_id else description
    structure = structure_of_labels(features, len(sequence), where)
    if structure is not None and RELEASE_DATE in structure.source:
        extra = {**extra, RELEASE_DATE: structure.source[RELEASE_DATE]}
    record = build_record(
        record_id,
        [rows],
        sequence=sequence,
        description=description,
        drop_repeats=options.dedup == "rows",
        max_hits=options.max_hits,
        extra=extra,
    )
    return record if structure is None else dataclasses.replace(record, structure=structure)


def _integers(
    features: Mapping[str, Any], name: str, where: str, largest: int, num_axes: int = 2
) -> NDArray[Any]:
    array = features.get(name)
    if not isinstance(array, np.ndarray) or array.ndim != num_axes or array.dtype.kind not in "iu":
        axes = "(rows, residues)" if num_axes == 2 else "one axis"
        raise SourceFileError(where, f"feature {name!r} must be there, with integers of {axes}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= largest:
        raise SourceFileError(
            where,
            f"feature {name!r} has values {int(array.min())} to {int(array.max())}; 0 to {largest} are "
            "possible",
        )
    return array


def _text(features: Mapping[str, Any], name: str, where: str) -> str:
    value = features.get(name)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(1)[0]
    if not isinstance(value, str | bytes):
        raise SourceFileError(where, f"feature {name!r} must be there, with one text")
    return _as_text(value)


def _texts(features: Mapping[str, Any], name: str, depth: int, where: str) -> list[str]:
    """Returns one text per row; empty ones when the feature is not there."""
    values = features.get(name)
    if values is None:
        return [""] * depth
    if not isinstance(values, np.ndarray) or values.shape != (depth,):
        raise SourceFileError(where, f"feature {name!r} must be an array with one entry per row ({depth})")
    return [_as_text(value) for value in values]


def _as_text(value: object) -> str:
    """Returns text that can be encoded again: what is no UTF-8 becomes a replacement character."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return str(value).encode("utf-8", errors="replace").decode("utf-8")
