"""The command lines of MMseqs2 as ColabFold's ``colabfold_search`` runs them, and what may be chosen of them.

Owns words alone. Does not own running them (`tools.mmseqs`). ``{database}`` and the like stand
for paths; all other names are files in the folder of a run. One after the other:

    createdb      the queries; the database too where it is a FASTA file
    search        three iterations of profile search, sensitivity 8, E-value 0.1, at most 10,000 targets
    expandaln     in a database of clusters: the members of those that were found, at most 95 % identical
    align         the second profile against what was found, ten alternative alignments, E-value 10
    filterresult  score per column 0.8, only where there are 100 rows
    result2msa    A3M with scores, the most diverse 3,000 rows per bucket of identity above 1,000 rows

A search *after* another, as ColabFold searches its environmental database, begins with the second profile of
that one instead of the query, and expands without the limit of identity.

Two additions make the answer the same everywhere: ``--split 1`` (MMseqs2 would split a database by the memory
of the machine, and choose the length of its words by that) and ``--dbtype 1`` (a protein of A, C, G and T is
no gene). ``--prefilter-mode 0``, which old versions do not know, is left at that default.

Where ``colabfold_search`` 1.6.3 is called without ``-s`` it gives MMseqs2 ``--k-score`` with quotes inside
its value, which MMseqs2 does not take: the search then has MMseqs2's own sensitivity, 5.7 (``s=5.7`` gives
the same rows). Here it is 8 unless told otherwise, that of ``colabfold_search -s 8`` and of its function.

Source: ColabFold ``colabfold/mmseqs/search.py`` mmseqs_search_monomer; MMseqs2 user guide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from foldfeed.pipelines.errors import ConfigError

# What is searched: a FASTA file, a database of sequences, one of clusters, or one of clusters with an earlier
# search's profile.
Kind = Literal["fasta", "sequences", "clusters", "clusters after"]

Command = tuple[str, ...]

_CREATE = ("--dbtype", "1", "--shuffle", "0", "-v", "2")
_LOAD_MODES = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MmseqsOptions:
    """What a person may choose of an MMseqs2 search.

    Attributes:
      after: name of the database whose search makes the profile that this one begins with; "" for none.
      filter: ``colabfold_search --filter``: thresholds against rows that are similar or weak, 1; 0 keeps
        a million rows of any score.
      sensitivity: ``-s``, 1 to 8.
      db_load_mode: ``--db-load-mode``, how an index comes into memory: 0, MMseqs2 decides; 1, it is read; 2,
        it is mapped, so that runs at a time share it; 3, mapped and touched. Answers do not depend on it.
    """

    after: str = ""
    filter: bool = True
    sensitivity: float = 8.0
    db_load_mode: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.sensitivity <= 8:
            raise ConfigError(f"s={self.sensitivity:g} must be 1 to 8, MMseqs2's sensitivity")
        if self.db_load_mode not in range(_LOAD_MODES):
            raise ConfigError(f"db-load-mode={self.db_load_mode} must be 0, 1, 2 or 3")

    @classmethod
    def parse(cls, words: Iterable[str]) -> MmseqsOptions:
        """Returns the options of ``after=NAME``, ``filter=0``, ``s=7.5``, ``db-load-mode=2``.

        Raises:
          ConfigError: an unknown word, one twice, or a value out of its range.
        """
        found: dict[str, str] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key not in ("after", "filter", "s", "db-load-mode") or not value or key in found:
                what = "is given twice" if key in found else "is unknown"
                raise ConfigError(
                    f"option {word!r} of mmseqs2 {what}; write after=NAME, filter=0, s=7.5 or "
                    "db-load-mode=2, each at most once, with commas between them"
                )
            found[key] = value
        if found.get("filter", "1") not in ("0", "1"):
            raise ConfigError(f"option 'filter={found['filter']}' of mmseqs2 must be filter=0 or filter=1")
        try:
            return cls(
                after=found.get("after", ""),
                filter=found.get("filter", "1") == "1",
                sensitivity=float(found.get("s", 8)),
                db_load_mode=int(found.get("db-load-mode", 0)),
            )
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"options {found} of mmseqs2: {error}") from error


DEFAULTS = MmseqsOptions()


def commands_of(
    kind: Kind, options: MmseqsOptions, *, threads: int = 1, db_load_mode: int = 0
) -> tuple[Command, ...]:
    """Returns the commands of a search; `argv_template` is made of those with one thread and load mode 0."""
    run = ("--db-load-mode", str(db_load_mode), "--threads", str(threads), "-v", "2")
    begin = ("createdb", "query.fasta", "query", *_CREATE)
    if kind == "fasta":
        return (("createdb", "{fasta}", "target", *_CREATE), begin, *_searched("query", options, run))
    if kind == "sequences":
        return (begin, *_searched("query", options, run))
    query = "profile" if kind == "clusters after" else "query"
    return (begin, *_searched(query, options, run, expanded=True))


def _searched(
    query: str, options: MmseqsOptions, run: Command, *, expanded: bool = False
) -> tuple[Command, ...]:
    """Returns what follows on ``createdb``.

    Args:
      query: name of what is searched with.
      options: of the search.
      run: options of every command.
      expanded: the members of clusters are the answer.
    """
    members = "{sequences}" if expanded else "{database}"
    keep = options.filter
    search = (
        *("search", query, "{database}", "found", "tmp", "--num-iterations", "3", "-a", "-e", "0.1"),
        *("--max-seqs", "10000", "-s", f"{options.sensitivity:.1f}", "--split", "1", *run),
    )
    limits = ("--expand-filter-clusters", str(int(keep)), "--max-seq-id", "0.95")
    expand = (
        *("expandaln", query, "{sequences}", "found", "{alignments}", "expanded"),
        *("--expansion-mode", "0", "-e", "inf", *(limits if query == "query" else ()), *run),
    )
    align = (
        *("align", "tmp/latest/profile_1", members, "expanded" if expanded else "found", "aligned"),
        *("-e", "10", "--max-accept", "100000" if keep else "1000000", "--alt-ali", "10", "-a", *run),
    )
    select = (
        *("filterresult", "query", members, "aligned", "filtered", "--qid", "0"),
        *("--qsc", "0.8" if keep else "-20.0"),
        *("--diff", "0", "--max-seq-id", "1.0", "--filter-min-enable", "100", *run),
    )
    write = (
        *("result2msa", "query", members, "filtered", "msa", "--msa-format-mode", "6"),
        *("--filter-msa", str(int(keep)), "--filter-min-enable", "1000", "--diff", "3000"),
        *("--qid", "0.0,0.2,0.4,0.6,0.8,1.0", "--qsc", "0", "--max-seq-id", "0.95", *run),
    )
    return (search, expand, align, select, write) if expanded else (search, align, select, write)
