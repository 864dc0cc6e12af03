"""`host_features`: what `features.featurise.featurise` gives, for samples that stay on the CPU.

The same numbers to the last bit, by other ways (a test compares): agreement is counted in bits
(`bit_counters`), profiles by counting cells, and deletions, of which alignments have few, are handled where
they are and not at every cell. Features are written once, into tensors of their final shapes. Samples are
made one by one, by the threads that read them: padding several to one shape would cost more than it saves
(`step_features`, made for a GPU, took a hundred times as long on a CPU).

Thread safe (pure functions). Shape legend as in `features.featurise`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from foldfeed.loader.features import bit_counters
from foldfeed.loader.features.clusters import NUM_CLASSES
from foldfeed.loader.features.featurise import (
    NUM_MSA_CHANNELS,
    NUM_TARGET_CHANNELS,
    deletion_value,
    replace_masked,
)
from foldfeed.loader.features.forms import COMPACT, FULL, Features, compact_dtype
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.features.structure_labels import label_features
from foldfeed.loader.features.templates import template_slots
from foldfeed.loader.reading.plan import NOT_MASKED
from foldfeed.loader.recipe import AF3, MASKED_LM, Recipe

# Counters of clusters that are filled at a time, and rows that are counted at a time: with the rows' indices
# they fit into a core's second-level cache.
COUNTERS_BLOCK_BYTES = 512 << 10
COUNT_BLOCK_ROWS = 256


class _Deletions(NamedTuple):
    """The cells of a crop at which something was deleted, of all rows read.

    Attributes:
      row: int64 (d,), places in the rows read.
      column: int64 (d,), of the crop.
      deleted: int32 (d,), above 0.
      value: float32 (d,), see `features.featurise.deletion_value`.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    deleted: NDArray[np.int32]
    value: torch.Tensor


def host_features(raw: RawSample, recipe: Recipe, form: str = FULL) -> Features:
    """Returns the features of one sample, in tensors that share no memory with ``raw``.

    Args:
      raw: one sample as read, on the CPU.
      recipe: for the kind and the shapes.
      form: one of `features.forms.FORMS`.
    Returns: see `features.featurise.featurise`, or that in another form, see
      `features.forms.compact_features`.
    """
    sample = _Sample(raw, recipe, form)
    sample.add_target()
    if recipe.name == AF3:
        sample.add_rows()
    elif recipe.name == MASKED_LM:
        sample.add_masked_rows()
    else:
        sample.add_clusters()
        sample.add_extra()
    # Not every sample need be read with labels.
    if recipe.labels and len(raw.resolution):
        sample.add_labels()
    return sample.features | template_slots(recipe, raw.msa.device)


class _Sample:
    """Features of one sample as they come into being.

    Attributes:
      features: what is there.
    """

    def __init__(self, raw: RawSample, recipe: Recipe, form: str) -> None:
        self.features: Features = {}
        self._raw = raw
        self._recipe = recipe
        self._is_compact = form == COMPACT
        self._residues = recipe.crop_residues
        self._row_shape = (recipe.num_clusters, recipe.crop_residues)
        self._crop = slice(*raw.crop_in_columns)
        self._msa = raw.msa.numpy()
        self._centre_at = raw.centre_at.numpy()

    def add_target(self) -> None:
        """Adds what describes the query."""
        aatype = self._raw.aatype
        size = len(aatype)
        self._put("aatype", aatype, (self._residues,), torch.int64)
        index = torch.arange(size) + self._raw.first_residue
        self._put("residue_index", index, (self._residues,), torch.int64)
        self._ones("seq_mask", (self._residues,), (size,))
        if not self._is_compact:
            target = torch.zeros((self._residues, NUM_TARGET_CHANNELS))
            target[torch.arange(size), 1 + aatype.long()] = 1.0
            self.features["target_feat"] = target

    def add_rows(self) -> None:
        """Adds AlphaFold 3's features of the rows."""
        rows = self._msa[self._centre_at]
        self._put_rows("msa", rows, torch.int64)
        self._ones("msa_mask", self._row_shape, rows.shape)
        self._put_deletions("", self._row_shape, self._centre_at)
        self._put("profile", self._raw.profile, (self._residues,), torch.float32)
        self._put("deletion_mean", self._raw.deletion_mean, (self._residues,), torch.float32)

    def add_masked_rows(self) -> None:
        """Adds rows for a masked language model."""
        self._put_rows("msa", self._add_truth(), torch.int64)

    def add_clusters(self) -> None:
        """Adds AlphaFold 2's features of the clustered MSA."""
        centres = self._add_truth()
        cluster_of = self._clusters(centres)
        centres = centres[:, self._crop]
        num_centres, width = centres.shape
        # Float32 in AlphaFold 2's order of additions: (1e-6 + 1) + members.
        num_members = np.bincount(cluster_of, minlength=num_centres) - 1
        sizes = (np.float32(1e-6) + np.float32(1.0)) + num_members.astype(np.float32)
        slot, place, mean_value = self._cluster_deletions(cluster_of, sizes)
        if self._is_compact:
            profile = torch.empty((num_centres, width, NUM_CLASSES))
            self._fill_profiles(profile.numpy(), centres, cluster_of, sizes)
            self._put_rows("msa", centres, torch.int64)
            self._put_deletions("", self._row_shape, self._centre_at)
            self._put("cluster_profile", profile, self._row_shape, torch.float32)
            self._scatter("cluster_deletion_value", self._row_shape, (slot, place), mean_value)
            return
        feature = torch.zeros((*self._row_shape, NUM_MSA_CHANNELS))
        channels = feature.numpy()
        cells = self._residues * np.arange(num_centres)[:, None] + np.arange(width)
        channels.reshape(-1)[NUM_MSA_CHANNELS * cells + centres] = 1.0
        self._fill_profiles(channels[:num_centres, :width, NUM_CLASSES + 2 : -1], centres, cluster_of, sizes)
        channels[slot, place, -1] = mean_value.numpy()
        slot, place, value = self._deletions_of(self._centre_at)
        channels[slot, place, NUM_CLASSES] = 1.0
        channels[slot, place, NUM_CLASSES + 1] = value.numpy()
        self.features["msa_feat"] = feature

    def add_extra(self) -> None:
        """Adds the extra MSA."""
        extra_at = self._raw.extra_at.numpy()
        shape = (self._recipe.num_extra, self._residues)
        rows = self._msa[extra_at, self._crop]
        self._put("extra_msa", torch.from_numpy(rows), shape, torch.int64)
        self._ones("extra_msa_mask", shape, rows.shape)
        self._put_deletions("extra_", shape, extra_at)

    def add_labels(self) -> None:
        """Adds what the structure teaches."""
        raw = self._raw
        labels = label_features(raw.aatype, raw.atom_positions, raw.atom_mask, raw.resolution)
        self.features["resolution"] = labels.pop("resolution")
        self.features["use_clamped_fape"] = raw.clamped[0].clone()
        for name, value in labels.items():
            self._put(name, value, (self._residues,), value.dtype)

    def _add_truth(self) -> NDArray[np.uint8]:
        """Adds what was masked, and returns the masked centres, uint8 (C, W)."""
        raw = self._raw
        rows = raw.msa[raw.centre_at]
        action = raw.action[:, self._crop]
        self._put("true_msa", rows[:, self._crop], self._row_shape, torch.int64)
        self._put("bert_mask", action != NOT_MASKED, self._row_shape, torch.float32)
        self._ones("msa_mask", self._row_shape, action.shape)
        return replace_masked(rows, raw.action, raw.profile, raw.profile_at, raw.profile_u).numpy()

    def _clusters(self, centres: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Returns the cluster of each row read, int64 (n,)."""
        member_at = self._raw.member_at.numpy()
        cluster_of = np.empty(len(self._msa), dtype=np.int64)
        cluster_of[self._centre_at] = np.arange(len(centres))
        cluster_of[member_at] = bit_counters.nearest(self._msa[member_at], centres)
        return cluster_of

    def _fill_profiles(
        self,
        profiles: NDArray[np.float32],
        centres: NDArray[np.uint8],
        cluster_of: NDArray[np.int64],
        sizes: NDArray[np.float32],
    ) -> None:
        """Writes the mean one-hot of each cluster, as `clusters.summarise`.

        A few clusters at a time, member after member, so that their counters stay in a core's cache.

        Args:
          profiles: float32 (C, r, 23), written.
          centres: uint8 (C, r), with masked residues.
          cluster_of: int64 (n,), of each row read.
          sizes: float32 (C,).
        """
        num_centres, width = centres.shape
        key = cluster_of[self._raw.member_at.numpy()]
        # Small integers are sorted by counting, in one pass.
        order = np.argsort(key.astype(np.uint16) if num_centres < 2**16 else key, kind="stable")
        members = self._raw.member_at.numpy()[order]
        ends = np.concatenate([[0], np.cumsum(np.bincount(key, minlength=num_centres))])
        together = max(1, COUNTERS_BLOCK_BYTES // (8 * width * NUM_CLASSES))
        for first in range(0, num_centres, together):
            some = slice(first, min(first + together, num_centres))
            rows = members[ends[first] : ends[some.stop]]
            cells = (some.stop - first) * width
            counts = self._token_counts(rows[:COUNT_BLOCK_ROWS], cluster_of, first, cells)
            for start in range(COUNT_BLOCK_ROWS, len(rows), COUNT_BLOCK_ROWS):
                block = rows[start : start + COUNT_BLOCK_ROWS]
                counts += self._token_counts(block, cluster_of, first, cells)
            # A centre counts with its masked residues.
            counts[NUM_CLASSES * np.arange(cells) + centres[some].reshape(-1)] += 1
            means = counts.astype(np.float32).reshape(-1, width, NUM_CLASSES)
            np.divide(means, sizes[some, None, None], out=profiles[some])

    def _token_counts(
        self, rows: NDArray[np.int64], cluster_of: NDArray[np.int64], first: int, cells: int
    ) -> NDArray[np.int64]:
        """Returns how often each token stands in the cells of some clusters, int64 (cells * 23,).

        Args:
          rows: int64 (k,), places in the rows read, of these clusters.
          cluster_of: int64 (n,), of each row read.
          first: of these clusters.
          cells: clusters times r.
        """
        width = self._crop.stop - self._crop.start
        places = (cluster_of[rows, None] - first) * (width * NUM_CLASSES) + NUM_CLASSES * np.arange(width)
        places += self._msa[rows, self._crop]
        return np.bincount(places.reshape(-1), minlength=cells * NUM_CLASSES)

    def _cluster_deletions(
        self, cluster_of: NDArray[np.int64], sizes: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor]:
        """Returns (cluster, column, value of the mean deletion count) where that is not 0."""
        width = self._crop.stop - self._crop.start
        found = self._deletions
        cell = cluster_of[found.row] * width + found.column
        # Whole numbers below 2**53: the sums are exact, and rounded once.
        sums = np.bincount(cell, weights=found.deleted, minlength=len(sizes) * width)
        at = np.flatnonzero(sums)
        means = sums[at].astype(np.float32) / sizes[at // width]
        return at // width, at % width, deletion_value(torch.from_numpy(means))

    @functools.cached_property
    def _deletions(self) -> _Deletions:
        counts = self._raw.deletions.numpy()
        at = np.flatnonzero(counts.reshape(-1) != 0)
        row, column = np.divmod(at, counts.shape[1])
        count = counts.reshape(-1)[at]
        return _Deletions(row, column, count, deletion_value(torch.from_numpy(count)))

    def _deletions_of(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor]:
        """Returns (place among ``rows``, column, value) of the deletions in some of the rows read."""
        place_of = np.full(len(self._msa), -1)
        place_of[rows] = np.arange(len(rows))
        found = self._deletions
        place = place_of[found.row]
        mine = np.flatnonzero(place >= 0)
        return place[mine], found.column[mine], found.value[torch.from_numpy(mine)]

    def _put_deletions(self, prefix: str, shape: tuple[int, int], rows: NDArray[np.int64]) -> None:
        """Adds whether and how much was deleted in some of the rows read."""
        place, column, value = self._deletions_of(rows)
        self._scatter(f"{prefix}deletion_value", shape, (place, column), value)
        if not self._is_compact:
            self._scatter(f"{prefix}has_deletion", shape, (place, column), torch.ones_like(value))

    def _put_rows(self, name: str, codes: NDArray[np.uint8], dtype: torch.dtype) -> None:
        self._put(name, torch.from_numpy(codes), self._row_shape, dtype)

    def _put(self, name: str, value: torch.Tensor, sizes: tuple[int, ...], usual: torch.dtype) -> None:
        """Adds a feature, its first axes grown to ``sizes`` by zeros at their ends."""
        dtype = compact_dtype(name, usual) if self._is_compact else usual
        room = torch.empty((*sizes, *value.shape[len(sizes) :]), dtype=dtype)
        here = room
        for axis, size in enumerate(value.shape[: len(sizes)]):
            here.narrow(axis, size, sizes[axis] - size).zero_()
            here = here.narrow(axis, 0, size)
        here.copy_(value)
        self.features[name] = room

    def _ones(self, name: str, sizes: tuple[int, ...], ones: tuple[int, ...]) -> None:
        """Adds a mask: 1 in the corner of so many rows and columns, 0 elsewhere."""
        self._put(name, torch.ones((), dtype=torch.uint8).expand(ones), sizes, torch.float32)

    def _scatter(
        self,
        name: str,
        shape: tuple[int, int],
        cells: tuple[NDArray[np.int64], NDArray[np.int64]],
        values: torch.Tensor,
    ) -> None:
        """Adds a feature that is 0 but at some cells."""
        dtype = compact_dtype(name, torch.float32) if self._is_compact else torch.float32
        room = torch.zeros(shape, dtype=dtype)
        room.view(-1)[torch.from_numpy(cells[0] * shape[1] + cells[1])] = values.to(dtype)
        self.features[name] = room
