"""`Recipe`: everything about how a record becomes a sample that is not chance.

Two recipes make AlphaFold 2's features of a clustered MSA. Both draw the same crop, the same rows and the
same masked positions for a sample; they differ in what they read to form clusters, and so in ``msa_feat``
channels 25..48 (cluster profile and cluster deletion mean) and in nothing else:

  ``af2``         reads all columns of all rows that survive block deletion; every surviving row that is no
                  cluster centre joins the centre it agrees with over the full length; the crop comes last.
                  Equal to AlphaFold 2's own transforms for equal draws.
  ``crop_first``  reads the crop's columns of the centres and of the extra rows only; those extra rows join
                  the centre they agree with inside the crop. So (1) agreement is counted over fewer columns,
                  and (2) clusters are formed from at most ``num_extra`` rows instead of all survivors.

From a store of row order ``permuted``, ``crop_first`` takes as many rows as otherwise, but a uniform sample
of the hits instead of what block deletion leaves (see `reading.plan.draw_slab`): they lie side by
side in the store, so a sample reads little more than it uses. Block deletion prefers early ranks and differs
much between samples; a uniform sample does neither, so its rows are farther from the query (27 % identity
instead of 33 % over real MSAs, bench/README.md). ``af2`` is the same from either kind of store; from a
permuted one it reads nearly every row of a record.

The two are equal when the crop covers the record and no more rows survive than centres and extra rows take
(a test; rank order). How much they differ elsewhere is measured by ``bench/recipe_difference.py``.

Two more give rows as they are, the query first and then hits in a random order, read in the crop's columns
only:

  ``af3``         as AlphaFold 3 feeds its MSA module: a uniform sample of the rows (of a uniformly drawn
                  number of them with ``subsample_rows``), deletions, and the profile and the deletion mean of
                  the full alignment. Nothing is masked.
  ``masked_lm``   rows for MSA transformers: codes of which some are masked, and what they were.

`Recipe.named` knows their usual values and, as ``af2_initial`` and ``af2_finetune``, those of AlphaFold 2's
two stages with labels. ``af2_initial_recycled`` and ``af2_finetune_recycled`` add what its model takes
besides: recycling with an alignment of its own for every iteration, and (empty) slots for templates.

With ``max_recycles`` every step has a number of recycling iterations, uniform in 0..max_recycles, which is
known before any work is done for it (`reading.plan.draw_num_recycles`) and equal on all ranks.
AlphaFold 2 samples a new alignment for every iteration of the model, the first one included. With
``resample_msa_in_recycling`` the features of the alignment (`RESAMPLED`) have an axis in front of their own,
one entry an iteration, and only the iterations that were drawn are read and made. Crop, labels and what
describes the query are the same in all of them. Entry 0 is what the recipe without recycling gives.

Owns validity and the digest that binds a saved position to a recipe; knows nothing of stores or tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from foldfeed.loader.errors import LoaderConfigError

AF2 = "af2"
CROP_FIRST = "crop_first"
AF3 = "af3"
MASKED_LM = "masked_lm"
NAMES = (AF2, CROP_FIRST, AF3, MASKED_LM)
# Those whose features are of a clustered MSA (``msa_feat``); the others give rows.
CLUSTERED = (AF2, CROP_FIRST)
# Features that are drawn anew for every recycling iteration; all others are equal in all of them.
RESAMPLED = frozenset(
    {
        *("msa_feat", "msa_mask", "true_msa", "bert_mask", "msa", "has_deletion", "deletion_value"),
        *("extra_msa", "extra_msa_mask", "extra_has_deletion", "extra_deletion_value"),
        # What msa_feat is made of, where a form of the features gives that instead.
        *("cluster_profile", "cluster_deletion_value"),
    }
)
# Raised whenever equal recipes would give other samples than before, so that old positions are refused.
TRANSFORMS_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a record becomes a sample. Defaults are AlphaFold 2's initial training stage.

    Attributes:
      name: one of `NAMES`, see the module.
      crop_residues: length of the crop, R.
      num_clusters: rows that become cluster centres, the query among them, C; where nothing is clustered, the
        rows.
      num_extra: further rows given to the extra-MSA stack, E; 0 for none, as where nothing is clustered.
      masked_fraction: chance of a position of a centre to be masked and predicted.
      uniform_prob: chance of a masked position to become any of the 20 residues, evenly.
      profile_prob: ... to be drawn from the alignment's profile at that column.
      same_prob: ... to stay as it is. What remains of 1 becomes the mask token.
      block_delete: delete blocks of rows first (AlphaFold 2, supplementary algorithm 1).
      num_blocks: blocks deleted; they may overlap.
      block_fraction: rows of a block, as a share of the depth.
      unclamped_fraction: share of samples whose crop starts by the rule that AlphaFold 2 uses where its
        structure loss is not clamped (biased to the N-terminus), see `reading.plan.draw_crop`. It
        uses 0.1 there; without that loss there is no reason for it, so the default is 0.
      labels: add the features of the record's structure, see
        `features.structure_labels.label_features`.
      subsample_rows: draw the number of rows uniformly from 1 to all, before C of them are taken at most
        (AlphaFold 3's training); ``af3`` and ``masked_lm`` only.
      max_recycles: a step has a number of recycling iterations, uniform in 0..max_recycles and equal for all
        of its samples and ranks, see `foldfeed.loader.batch.StepBatch`; AlphaFold 2 has 3.
      resample_msa_in_recycling: draw rows and masked positions anew for every iteration that was drawn.
      num_templates: empty slots for templates, T, see `features.templates.template_slots`; AlphaFold 2
        has 4; ``af2`` and ``crop_first`` only.
    """

    name: str = AF2
    crop_residues: int = 256
    num_clusters: int = 128
    num_extra: int = 1024
    masked_fraction: float = 0.15
    uniform_prob: float = 0.1
    profile_prob: float = 0.1
    same_prob: float = 0.1
    block_delete: bool = True
    num_blocks: int = 5
    block_fraction: float = 0.3
    unclamped_fraction: float = 0.0
    labels: bool = False
    subsample_rows: bool = False
    max_recycles: int = 0
    resample_msa_in_recycling: bool = False
    num_templates: int = 0

    def __post_init__(self) -> None:
        if self.name in PRESETS and self.name not in NAMES:
            raise LoaderConfigError("name", self.name, f"is a preset; use Recipe.named({self.name!r})")
        if self.name not in NAMES:
            raise LoaderConfigError(
                "name", self.name, f"is no recipe; choose one of {sorted({*NAMES, *PRESETS})}"
            )
        for field, minimum in (
            ("crop_residues", 1),
            ("num_clusters", 1),
            ("num_extra", 0),
            ("num_blocks", 0),
            ("max_recycles", 0),
            ("num_templates", 0),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise LoaderConfigError(field, value, f"must be an integer of at least {minimum}")
        for field in ("block_delete", "labels", "subsample_rows", "resample_msa_in_recycling"):
            if not isinstance(getattr(self, field), bool):
                raise LoaderConfigError(field, getattr(self, field), "must be True or False")
        self._check_together()
        for field in _FRACTIONS:
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value <= 1.0:
                raise LoaderConfigError(field, value, "must be a number from 0 to 1")
        if self.mask_prob < -1e-9:
            raise LoaderConfigError(
                "uniform_prob + profile_prob + same_prob",
                self.uniform_prob + self.profile_prob + self.same_prob,
                "must not exceed 1; what remains becomes the mask token",
            )

    def _check_together(self) -> None:
        if self.name in CLUSTERED and self.subsample_rows:
            raise LoaderConfigError(
                "subsample_rows", True, f"is of {AF3} and {MASKED_LM}, not of {self.name}"
            )
        if self.name not in CLUSTERED and self.num_extra != 0:
            raise LoaderConfigError(
                "num_extra", self.num_extra, f"must be 0: {self.name} has no extra rows, raise num_clusters"
            )
        if self.name == AF3 and self.masked_fraction != 0:
            raise LoaderConfigError(
                "masked_fraction", self.masked_fraction, f"must be 0: {AF3} masks nothing"
            )
        if self.resample_msa_in_recycling and not self.max_recycles:
            raise LoaderConfigError(
                "resample_msa_in_recycling", True, "has no effect without recycling; give max_recycles, too"
            )
        if self.num_templates and self.name not in CLUSTERED:
            raise LoaderConfigError(
                "num_templates",
                self.num_templates,
                f"must be 0: the slots are AlphaFold 2's, not {self.name}'s",
            )

    @classmethod
    def named(cls, name: str, **overrides: Any) -> Recipe:
        """Returns a named recipe with some values replaced: ``Recipe.named("crop_first", crop_residues=64)``.

        Args:
          name: one of `NAMES`, or a preset of `PRESETS`.
          overrides: values that differ from those of the name.
        Raises:
          LoaderConfigError: an unknown name, an unknown value, or one that cannot work.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"name"}
        for field, value in overrides.items():
            if field not in known:
                raise LoaderConfigError(field, value, f"a recipe has no such value; it has {sorted(known)}")
        kind, usual = PRESETS.get(name, (name, {}))
        return cls(name=kind, **(usual | overrides))

    @property
    def mask_prob(self) -> float:
        """Chance of a masked position to become the mask token."""
        return 1.0 - self.uniform_prob - self.profile_prob - self.same_prob

    @property
    def num_draws(self) -> int:
        """Alignments drawn for a sample: one for every recycling iteration, or one for all of them."""
        return self.max_recycles + 1 if self.resample_msa_in_recycling else 1

    @property
    def digest(self) -> str:
        """sha256 (hex) of all values and of the version of the transforms; equal recipes, equal digests."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {field: float(values[field]) for field in _FRACTIONS}
        # Came later; without them a recipe is the one that it was.
        values = {field: value for field, value in values.items() if field not in _LATER or value}
        document = json.dumps([TRANSFORMS_VERSION, values], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(document.encode()).hexdigest()


_FRACTIONS = (
    "masked_fraction",
    "uniform_prob",
    "profile_prob",
    "same_prob",
    "block_fraction",
    "unclamped_fraction",
)
_LATER = ("labels", "subsample_rows", "max_recycles", "resample_msa_in_recycling", "num_templates")

# Name -> (what it is, its usual values). Sources: Jumper et al. 2021, supplementary table 4, where the
# structure loss of 10 % of the samples is not clamped (section 1.11.5), up to 3 recycling iterations with an
# alignment drawn for each (sections 1.10, 1.11.2; OpenFold's config: max_recycling_iters 3, uniform_recycling
# and resample_msa_in_recycling True) and 4 templates (1.2.2); Abramson et al. 2024, supplementary
# section 2.2, and the 1,024 rows of AlphaFold 3's MSA module; Rao et al. 2021 (MSA Transformer): 15 % masked,
# of which 80 % become the mask token, 10 % another residue and 10 % stay.
_AF2_TRAINING = {"labels": True, "unclamped_fraction": 0.1}
_RECYCLED = {"max_recycles": 3, "resample_msa_in_recycling": True, "num_templates": 4}
_INITIAL = _AF2_TRAINING | {"crop_residues": 256, "num_clusters": 128, "num_extra": 1024}
_FINETUNE = _AF2_TRAINING | {"crop_residues": 384, "num_clusters": 512, "num_extra": 5120}
_ROWS = {"num_extra": 0, "block_delete": False}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "af2_initial": (AF2, _INITIAL),
    "af2_finetune": (AF2, _FINETUNE),
    "af2_initial_recycled": (AF2, _INITIAL | _RECYCLED),
    "af2_finetune_recycled": (AF2, _FINETUNE | _RECYCLED),
    AF3: (
        AF3,
        _ROWS | {"crop_residues": 384, "num_clusters": 1024, "masked_fraction": 0.0, "subsample_rows": True},
    ),
    MASKED_LM: (MASKED_LM, _ROWS | {"profile_prob": 0.0}),
}
