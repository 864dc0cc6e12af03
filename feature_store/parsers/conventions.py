"""What other programs call things in their files: letters, tokens, names of databases and files.

Importers and exporters share these, so that a file goes out under the convention by which it comes back.
"""

from __future__ import annotations

from pathlib import Path

from foldfeed.feature_store.parsers.bounded_files import kind_of

# Codes of AlphaFold 2's `msa` feature: one-letter order, X, gap (HHBLITS_AA_TO_ID).
HHBLITS_CODES = "ACDEFGHIKLMNPQRSTVWYX-"

# Boltz's tokens are <pad>, -, the twenty residues in AlphaFold 2's order, UNK; then nucleotides.
GAP_TOKEN = 1
FIRST_RESIDUE_TOKEN = 2
UNKNOWN_TOKEN = 22

# How Chai names the source database of the query's row.
CHAI_QUERY = "query"

STOCKHOLM_SUFFIXES = (".sto", ".stk", ".stockholm")

# Template hits, in the query's coordinates or not, are never rows of an alignment.
TEMPLATE_FILES = ("hmm_output", "pdb_hits", "pdb70_hits", "hmmsearch")
# Beside the files of a chain that an export wrote from a record with repeated rows: programs that merge such
# files drop repetitions, an import then does not. Others pass over it, as it is no alignment.
KEEPS_REPEATS = "repeats_kept.txt"
PAIRED = "paired"
PAIRED_DATABASES = ("uniprot", "pairing", PAIRED)


# What databases are called in others' folders, besides names that end in _hits.
_DATABASES = (
    "bfd_uniclust",
    "bfd_uniref",
    "mgnify",
    "small_bfd",
    "uniclust30",
    "uniref",
    "uniref30",
    "uniref90",
    "uniref100",
    "pair",
    "non_pairing",
    *PAIRED_DATABASES,
    *TEMPLATE_FILES,
)


def is_database_stem(stem: str) -> bool:
    """Returns whether a file of that name holds what one database gave for a query named elsewhere."""
    return stem in _DATABASES or stem.endswith("_hits")


def database_name(file_name: str) -> tuple[str, str] | None:
    """Returns database and kind of an alignment file, or None for a file that is none.

    ``uniref90_hits.sto.gz`` gives ``("uniref90", "sto")``; ``pdb70_hits.hhr`` and ``hmm_output.sto`` give
    None.
    """
    stem, extension = kind_of(Path(file_name))
    kind = "a3m" if extension == ".a3m" else "sto" if extension in STOCKHOLM_SUFFIXES else None
    if kind is None or stem in TEMPLATE_FILES or file_name.startswith("."):
        return None
    return stem.removesuffix("_hits"), kind
