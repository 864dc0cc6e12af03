"""`Sampling`: which records a run draws from and how often, as data.

Two ways to draw. ``once``: every record once an epoch, in an order of (seed, epoch). ``weighted``: sample g
gives a record with the record's probability, whatever the other samples gave (with replacement, as AlphaFold
2 does it); so shares of a mixture and weights are exact for every sample, and an epoch is a number of draws.

A `Component` names the records of one store that go in: a saved set, SQL conditions over the index, or all.
Its share is divided among its records by their weights, a product of the terms that it names. All values are
text and numbers, so a sampling can be kept as JSON beside a run and its digest binds saved positions to it.

Owns validity and the digest; reads no store (`order.selection` does).

Source: Jumper et al. 2021, supplementary sections 1.2.4 (75 % distillation) and 1.2.5 (filters, weights);
OpenFold ce0029e, ``config.py`` and ``data_transforms.py`` (the rows of the distillation set).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from foldfeed.loader.errors import LoaderConfigError

ONCE = "once"
WEIGHTED = "weighted"
KINDS = (ONCE, WEIGHTED)
JOIN = "join"
SHORT = "short"
EPOCH_ENDS = (JOIN, SHORT)
SPLIT_PREFIX = "splits/"
MAX_PLDDT = 100.0

# AlphaFold 2's filters over the table `records`. Like its parser, an entry without a resolution counts as 0
# (NMR), and so does a record without a structure.
RESOLUTION_BELOW_9_ANGSTROM = "coalesce(cast(structure->>'resolution_angstrom' as double), 0) < 9"
NO_RESIDUE_ABOVE_80_PERCENT = (
    "list_max([length(sequence) - length(replace(sequence, letter, '')) "
    "for letter in string_split('ARNDCQEGHILKMFPSTWYVX', '')]) <= 0.8 * length(sequence)"
)
AF2_FILTERS = (RESOLUTION_BELOW_9_ANGSTROM, NO_RESIDUE_ABOVE_80_PERCENT)

# Raised whenever equal samplings would draw other records than before, so that old positions are refused.
SAMPLING_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """Records that a run draws from.

    Attributes:
      store: name of the store among those that the loader gets; "" when it gets one.
      record_set: a saved set of that store; "" for all records.
      where: SQL conditions over the table ``records``, all of which a record must meet; see `AF2_FILTERS`.
      share: of the samples, in proportion to the shares of the other components; None for the only one.
      length_term: weight max(min(length, 512), 256) / 512.
      clusters: weight 1 / (records of this component in the record's cluster). ``splits/NAME`` takes the
        cluster ids of a saved split, other names are a text column of the index or ``extra.KEY``.
      column: weight by a column of numbers of the index, or ``extra.KEY``.
      max_msa_rows: rows of an alignment that a sample starts from, the query among them: a uniform sample of
        those that block deletion leaves; 0 for all. See `af2_distillation`.
      min_plddt: labels of a residue count only where the B factor of one of its atoms, which is the pLDDT in
        predicted structures, is above this; 0 for all.
    """

    store: str = ""
    record_set: str = ""
    where: tuple[str, ...] = ()
    share: float | None = None
    length_term: bool = False
    clusters: str = ""
    column: str = ""
    max_msa_rows: int = 0
    min_plddt: float = 0.0

    def __post_init__(self) -> None:
        for field in ("store", "record_set", "clusters", "column"):
            if not isinstance(getattr(self, field), str):
                raise LoaderConfigError(field, getattr(self, field), "must be text")
        if not isinstance(self.where, tuple) or not all(
            isinstance(text, str) and text.strip() for text in self.where
        ):
            raise LoaderConfigError("where", self.where, "must be a tuple of SQL conditions")
        if not isinstance(self.length_term, bool):
            raise LoaderConfigError("length_term", self.length_term, "must be True or False")
        if self.share is not None and not _is_positive(self.share):
            raise LoaderConfigError("share", self.share, "must be a finite number above 0; leave others out")
        rows, plddt = self.max_msa_rows, self.min_plddt
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
            raise LoaderConfigError(
                "max_msa_rows", rows, "must be an integer of at least 1 (the query), or 0: all"
            )
        if plddt != 0 and not (_is_positive(plddt) and plddt < MAX_PLDDT):
            raise LoaderConfigError("min_plddt", plddt, f"must be at least 0 and below {MAX_PLDDT}")

    @classmethod
    def af2(cls, *, clusters: str, where: tuple[str, ...] = AF2_FILTERS, **values: Any) -> Component:
        """Returns records as AlphaFold 2 draws them: its filters, length term and 1 / cluster size.

        Args:
          clusters: see the class; AlphaFold 2 has 40 % identity clusters by MMseqs2.
          where: conditions.
          values: the other attributes.
        """
        return cls(clusters=clusters, where=where, length_term=True, **values)

    @classmethod
    def af2_distillation(cls, **values: Any) -> Component:
        """Returns records of a self-distillation set as OpenFold treats them.

        Alignments of more than 1,000 rows are cut to a uniform sample of 1,000 after block deletion
        (``max_distillation_msa_clusters``, ``sample_msa_distillation``), and residues of which no atom's
        B factor exceeds 50 have no labels (``make_pdb_features``, ``confidence_threshold``). AlphaFold 2
        masked residues by a confidence of its own (a Kullback-Leibler divergence below 0.5, supplementary
        section 1.3), which files of structures do not hold.

        Args:
          values: the other attributes, or others instead of these two.
        """
        return cls(**({"max_msa_rows": 1000, "min_plddt": 50.0} | values))

    @property
    def has_weights(self) -> bool:
        """Whether its records may differ in weight."""
        return self.length_term or bool(self.clusters) or bool(self.column)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How records are drawn. The default is every record of one store once an epoch.

    Example:
      >>> Sampling(kind="weighted", components=(
      ...     Component.af2(store="pdb", share=0.25, clusters="splits/mmseqs40"),
      ...     Component(store="distillation", share=0.75),
      ... ))

    Attributes:
      kind: ``once`` or ``weighted``.
      components: where records come from. ``once`` visits those of all of them, so it takes no shares and no
        weights.
      epoch_samples: draws that make an epoch of ``weighted``; as many as there are records when None.
      epoch_end: ``join``: epochs follow each other without a gap, so every step is full and one may hold the
        end of an epoch and the start of the next. ``short``: the last step of an epoch holds what is left of
        it, spread over the shards; one that gets no sample is left out of the batch.
    """

    kind: str = ONCE
    components: tuple[Component, ...] = (Component(),)
    epoch_samples: int | None = None
    epoch_end: str = JOIN

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LoaderConfigError("kind", self.kind, f"is no way to draw; choose one of {list(KINDS)}")
        if self.epoch_end not in EPOCH_ENDS:
            raise LoaderConfigError("epoch_end", self.epoch_end, f"choose one of {list(EPOCH_ENDS)}")
        parts = self.components
        if not isinstance(parts, tuple) or not parts or not all(isinstance(c, Component) for c in parts):
            raise LoaderConfigError("components", parts, "must be a tuple of one Component or more")
        size = self.epoch_samples
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise LoaderConfigError("epoch_samples", size, "must be an integer of at least 1")
        if self.kind == ONCE:
            self._check_once()
        elif len(parts) > 1 and any(component.share is None for component in parts):
            raise LoaderConfigError(
                "share", None, f"each of {len(parts)} components of a weighted sampling needs one, e.g. 0.75"
            )

    def _check_once(self) -> None:
        rule = "has no effect where every record comes once an epoch; leave it out or use kind='weighted'"
        for component in self.components:
            if component.has_weights:
                raise LoaderConfigError("component", component, f"its weight {rule}")
            if component.share is not None:
                raise LoaderConfigError("share", component.share, rule)
        if self.epoch_samples is not None:
            raise LoaderConfigError("epoch_samples", self.epoch_samples, rule)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values that say everything, see `from_dict`."""
        values = dataclasses.asdict(self)
        for component in values["components"]:
            component["where"] = list(component["where"])
        return {**values, "components": list(values["components"])}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sampling:
        """Returns the sampling that JSON values describe; what they leave out has its default.

        Raises:
          LoaderConfigError: an unknown name, or a value that cannot work.
        """
        known = _known(cls, values)
        if "components" in known:
            parts = [_known(Component, component) for component in _listed(known, "components")]
            for part in parts:
                if "where" in part:
                    part["where"] = tuple(_listed(part, "where"))
            known["components"] = tuple(Component(**part) for part in parts)
        return cls(**known)

    @property
    def digest(self) -> str:
        """sha256 (hex) of all values; equal samplings, equal digests."""
        values = self.to_dict()
        for component in values["components"]:
            component["share"] = None if component["share"] is None else float(component["share"])
            component["min_plddt"] = float(component["min_plddt"])
            # Came later; without them a sampling is the one that it was.
            for field in [field for field in _LATER if not component[field]]:
                del component[field]
        document = json.dumps([SAMPLING_VERSION, values], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(document.encode()).hexdigest()


_LATER = ("max_msa_rows", "min_plddt")


def _known(kind: type, values: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping):
        raise LoaderConfigError(kind.__name__, values, "must be an object with names and values")
    for name, value in values.items():
        if name not in names:
            raise LoaderConfigError(
                str(name), value, f"a {kind.__name__} has no such value; it has {sorted(names)}"
            )
    return dict(values)


def _listed(values: Mapping[str, Any], field: str) -> list[Any]:
    value = values[field]
    if not isinstance(value, list | tuple):
        raise LoaderConfigError(field, value, "must be a list")
    return list(value)


def _is_positive(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
