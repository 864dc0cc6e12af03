"""What a sample reads and how it is drawn, decided before any I/O.

A plan needs the length and depth of a record and nothing of its content, so its cost is known before a byte
is read: which rows, which residues, which of the rows are cluster centres and extra rows, and at which
positions of the centres something is masked. What a recipe draws, and where recipes part, says
`foldfeed.loader.recipe`.

From a store of row order ``permuted``, all recipes but `af2` read a slab: the query and a run of rows that
lie side by side in the store, which is a uniform sample of the hits (see `draw_slab`).

Where a recipe draws an alignment for every recycling iteration, each of them is a plan of its own (``draw``):
crop, labels and address are the same, rows and masked positions are drawn anew.

Does not own reading (fetch) or arithmetic on residues (featurise). Pure functions: a plan is f(recipe, seed,
address, length, depth, row order, draw, the rules of the record's component), equal in any thread and on any
machine.

Shape legend: N rows of the record, S rows that survive block deletion, C centres, E extra rows, L residues of
the record, W residues read.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store import StoredRun
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.grid import Rows
from foldfeed.feature_store.format.settings import PERMUTED, RANK
from foldfeed.loader.order import draw_kernel
from foldfeed.loader.order.counter_rng import Purpose, Stream, stream, words_by_numpy
from foldfeed.loader.order.order import SampleAddress
from foldfeed.loader.recipe import AF2, AF3, Recipe

NUM_AMINO_ACIDS = 20
# What happens to a position of a cluster centre. 0..19: becomes that residue; `alphabet.MASK` (22): becomes
# the mask token; and the three below. Anything but NOT_MASKED counts in the loss.
SAME = 24
FROM_PROFILE = 25
NOT_MASKED = 255


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskDraw:
    """Which positions of the centres are masked, and by what.

    Attributes:
      action: uint8 (C, W), see `NOT_MASKED`.
      profile_at: int64 (k,), flat positions in ``action`` whose residue comes from the column's profile.
      profile_u: float64 (k,), uniform in [0, 1), to be looked up in the column's cumulative profile.
    """

    action: NDArray[np.uint8]
    profile_at: NDArray[np.int64]
    profile_u: NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlan:
    """One sample, drawn but not read.

    Attributes:
      address: which sample of which record.
      length: L.
      depth: N.
      crop: residues ``[start, stop)`` of the sample.
      columns: residues ``[start, stop)`` to read, W of them; contains the crop.
      slab: the run of stored rows to read; None where single ranks are read.
      rows: int64 (n,), rows to read, ascending: ranks, or places in the slab (0..n-1) where there is one.
      centres: int64 (C,), the rows that are cluster centres, in their order; the first is 0, the query.
      extras: int64 (E,), the extra rows in their order.
      masking: for the columns read.
      labels: whether the structure's atoms are read, too.
      clamped: whether the structure loss of this sample is to be clamped (by the rule that drew the crop).
      full_deletion_mean: whether the deletion mean of the whole alignment is.
      draw: which of the sample's alignments, 0 .. ``Recipe.num_draws`` - 1; only the first has labels.
      min_plddt: residues without an atom whose B factor is above have no labels; 0 for no such rule.
    """

    address: SampleAddress
    length: int
    depth: int
    crop: tuple[int, int]
    columns: tuple[int, int]
    slab: StoredRun | None
    rows: NDArray[np.int64]
    centres: NDArray[np.int64]
    extras: NDArray[np.int64]
    masking: MaskDraw
    labels: bool
    clamped: bool
    full_deletion_mean: bool
    draw: int
    min_plddt: float

    @property
    def num_cells(self) -> int:
        """Cells of the alignment that this sample reads: its cost, known before reading."""
        return len(self.rows) * (self.columns[1] - self.columns[0])

    @property
    def selection(self) -> Rows:
        """The rows to read, as the store wants them: `Record.crop`, `Record.plan`, `CropRequest`."""
        if self.slab is not None:
            return self.slab
        first, last = int(self.rows[0]), int(self.rows[-1])
        # A slice lets the store copy whole tiles instead of gathering single rows.
        return slice(first, last + 1) if last - first + 1 == len(self.rows) else self.rows

    @property
    def atoms(self) -> tuple[int, int]:
        """Residues ``[start, stop)`` whose atoms are read: a residue's torsions need the one before it."""
        return max(self.crop[0] - 1, 0), self.crop[1]

    @property
    def crop_in_columns(self) -> tuple[int, int]:
        """The crop, counted from the first column read."""
        return self.crop[0] - self.columns[0], self.crop[1] - self.columns[0]


def make_plan(
    recipe: Recipe,
    seed: int,
    address: SampleAddress,
    length: int,
    depth: int,
    row_order: str = RANK,
    *,
    draw: int = 0,
    max_msa_rows: int = 0,
    min_plddt: float = 0.0,
) -> SamplePlan:
    """Returns the plan of a sample.

    Args:
      recipe: how.
      seed: of the run.
      address: which sample.
      length: residues of its record, at least 1.
      depth: rows of its record, at least 1.
      row_order: of the store.
      draw: which of its alignments, see `SamplePlan`.
      max_msa_rows: of the record's component, see `order.sampling.Component`.
      min_plddt: of the record's component.
    """
    assert 0 <= draw < recipe.num_draws, (draw, recipe)
    crop, clamped = draw_crop(recipe, stream(seed, address.sample, Purpose.CROP), length)
    slab = None
    if recipe.name != AF2 and row_order == PERMUTED:
        slab, centres, extras = draw_slab(recipe, seed, address.sample, depth, draw, max_msa_rows)
        columns, rows = crop, np.arange(slab.num_rows, dtype=np.int64)
    else:
        survivors, centres, extras = draw_rows(recipe, seed, address.sample, depth, draw, max_msa_rows)
        if recipe.name == AF2:
            columns, rows = (0, length), survivors
        else:
            # Often all are taken, which are sorted already.
            is_all = len(centres) + len(extras) == len(survivors)
            columns, rows = crop, survivors if is_all else np.sort(np.concatenate([centres, extras]))
    masking = draw_masking(
        recipe, stream(seed, address.sample, Purpose.MASKING, draw), len(centres), length, columns
    )
    return SamplePlan(
        address=address,
        length=length,
        depth=depth,
        crop=crop,
        columns=columns,
        slab=slab,
        rows=rows,
        centres=centres,
        extras=extras,
        masking=masking,
        labels=recipe.labels and draw == 0,
        clamped=clamped,
        full_deletion_mean=recipe.name == AF3,
        draw=draw,
        min_plddt=min_plddt,
    )


def draw_num_recycles(recipe: Recipe, seed: int, step: int) -> int:
    """Returns the number of recycling iterations of a step, uniform in 0..max_recycles.

    The model runs once more than that. A function of (recipe, seed, step) alone, so all ranks know it, before
    anything is done for the step.

    Source: Jumper et al. 2021, supplementary section 1.10 and algorithm 31 (N_cycle uniform in 1..4 at
    training time, shared by the batch); OpenFold ``OpenFoldDataLoader._add_batch_properties``.
    """
    if not recipe.max_recycles:
        return 0
    return stream(seed, step, Purpose.RECYCLES).few_integers(recipe.max_recycles + 1, 1)[0]


def draw_slab(
    recipe: Recipe, seed: int, sample: int, depth: int, draw: int = 0, max_msa_rows: int = 0
) -> tuple[StoredRun, NDArray[np.int64], NDArray[np.int64]]:
    """Returns a run of stored rows of a permuted store, and which of them are centres and extra rows.

    As many rows are taken as `draw_rows` would leave: with block deletion as many as survive it, capped by
    what centres and extra rows take. Which ones is another matter: a uniform sample of the hits, where block
    deletion leaves runs of rank (and prefers early ones). That is what makes them a single run of the store.
    The run starts at any hit, all equally likely, so every hit is in it with the same chance.

    Returns: the run; int64 (C,) and int64 (E,), places in it: the query, then a random order of its hits.
    """
    num_hits = depth - 1
    if recipe.block_delete:
        num_hits = count_kept(recipe, stream(seed, sample, Purpose.BLOCK_DELETE, draw), depth) - 1
    if max_msa_rows:
        # A uniform sample of a uniform sample is one, so only its size is to be kept.
        num_hits = min(num_hits, max_msa_rows - 1)
    num_hits = draw_num_hits(recipe, seed, sample, num_hits, draw)
    (start,) = stream(seed, sample, Purpose.SLAB, draw).few_integers(max(depth - 1, 1), 1)
    rows = np.zeros(1 + num_hits, dtype=np.int64)
    rows[1:] = stream(seed, sample, Purpose.ROWS, draw).order(num_hits, first_item=1)
    return StoredRun(start, 1 + num_hits), rows[: recipe.num_clusters], rows[recipe.num_clusters :]


def draw_rows(
    recipe: Recipe, seed: int, sample: int, depth: int, draw: int = 0, max_msa_rows: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns (surviving rows, cluster centres, extra rows), as ranks.

    Of the rows that block deletion leaves, ``max_msa_rows`` (0: all) survive, the query and a uniform sample
    of the hits: for the self-distillation set, see `order.sampling.Component`.

    The query is always the first centre; the other centres and the extra rows are the head of one random
    order of the surviving rows. AlphaFold 2 shuffles the rows that are left a second time before it takes the
    extra rows, which changes nothing about their distribution.

    Returns: int64 (S,) ascending, int64 (C,), int64 (E,); centres and extras are disjoint parts of the first.
    """
    survivors = np.arange(depth, dtype=np.int64)
    if recipe.block_delete:
        survivors = delete_blocks(recipe, stream(seed, sample, Purpose.BLOCK_DELETE, draw), depth)
    if 0 < max_msa_rows < len(survivors):
        order = stream(seed, sample, Purpose.DISTILLATION, draw).order(len(survivors) - 1, max_msa_rows - 1)
        survivors = np.concatenate([survivors[:1], survivors[1:][np.sort(order)]])
    num_hits = draw_num_hits(recipe, seed, sample, len(survivors) - 1, draw)
    taken = np.zeros(1 + num_hits, dtype=np.int64)
    taken[1:] = stream(seed, sample, Purpose.ROWS, draw).order(len(survivors) - 1, num_hits, first_item=1)
    # The query is survivor 0.
    rows = survivors[taken]
    return survivors, rows[: recipe.num_clusters], rows[recipe.num_clusters :]


def draw_num_hits(recipe: Recipe, seed: int, sample: int, available: int, draw: int = 0) -> int:
    """Returns how many hits a sample takes: what fits, of all or of a uniformly drawn number of them.

    With ``subsample_rows`` the number of rows, the query among them, is uniform in 1..available + 1 before
    the recipe's own limit cuts it (AlphaFold 3, supplementary section 2.2).
    """
    if recipe.subsample_rows:
        (available,) = stream(seed, sample, Purpose.DEPTH, draw).few_integers(available + 1, 1)
    return min(available, recipe.num_clusters - 1 + recipe.num_extra)


def delete_blocks(recipe: Recipe, random: Stream, depth: int) -> NDArray[np.int64]:
    """Returns the rows that survive block deletion.

    ``num_blocks`` blocks of floor(block_fraction * depth) rows start at rows uniform in ``range(depth)`` and
    end at the last row; they may overlap. The query stays. With 5 blocks of 0.3 about 26.5 % of many rows
    survive, as contiguous runs of rank.

    Args:
      recipe: its block values.
      random: the stream of this choice.
      depth: N, at least 1.
    Returns: int64 (S,), ascending, 0 first.
    Source: Jumper et al. 2021, supplementary algorithm 1; AlphaFold 2 ``block_delete_msa``.
    """
    kept = np.ones(depth, dtype=bool)
    for start, stop in _blocks(recipe, random, depth):
        kept[start:stop] = False
    kept[0] = True
    return np.flatnonzero(kept)


def count_kept(recipe: Recipe, random: Stream, depth: int) -> int:
    """Returns how many rows survive block deletion, without making them, see `delete_blocks`."""
    # Row 0 stays.
    deleted, behind = 0, 1
    for start, stop in sorted(_blocks(recipe, random, depth)):
        if stop > behind:
            deleted += stop - max(start, behind)
            behind = stop
    return depth - deleted


def _blocks(recipe: Recipe, random: Stream, depth: int) -> list[tuple[int, int]]:
    """Returns the rows ``[start, stop)`` of each block that is deleted, in the order drawn."""
    # In float32, as AlphaFold 2 computes it: floor(0.3 * 10) is 3 either way, other fractions may round
    # apart.
    block_rows = int(np.float32(depth) * np.float32(recipe.block_fraction))
    starts = random.few_integers(depth, recipe.num_blocks)
    return [(start, min(start + block_rows, depth)) for start in starts]


def draw_crop(recipe: Recipe, random: Stream, length: int) -> tuple[tuple[int, int], bool]:
    """Returns the crop window ``[start, stop)`` of a record, and whether it is of the clamped kind.

    A record that is no longer than the crop is taken whole.

    AlphaFold 2 has two rules, with n = length - crop. Where its structure loss is clamped (90 % of samples):
    start uniform in 0..n. Where it is not: x uniform in 0..n, then start uniform in 0..n-x, which prefers the
    N-terminus. Its published code uses the first one for all. ``unclamped_fraction`` of the samples use the
    second.

    Source: Jumper et al. 2021, supplementary section 1.2.8; AlphaFold 2 ``random_crop_to_size``.
    """
    size = min(length, recipe.crop_residues)
    last_start = length - size
    chance, shift, start = random.few_words(3)
    clamped = chance >> 32 >= round(recipe.unclamped_fraction * 2**32)
    if not clamped:
        last_start -= _scale(shift, last_start + 1)
    first = _scale(start, last_start + 1)
    return (first, first + size), clamped


def draw_masking(
    recipe: Recipe, random: Stream, num_centres: int, length: int, columns: tuple[int, int]
) -> MaskDraw:
    """Returns what is masked in the centres, for the columns read.

    One word is drawn for every (centre, residue) of the whole record: its high half decides whether the
    position is masked, its low half by what. The columns are cut out afterwards, so the draw at a position
    does not depend on how much of the record a recipe reads.

    Args:
      recipe: its fractions.
      random: the stream of this choice.
      num_centres: C.
      length: L.
      columns: residues ``[start, stop)`` to return.
    Source: AlphaFold 2 ``make_masked_msa``. Its 1e-10 added to every probability is left out.
    """
    if recipe.masked_fraction == 0.0:
        width = columns[1] - columns[0]
        return MaskDraw(
            action=np.full((num_centres, width), NOT_MASKED, dtype=np.uint8),
            profile_at=np.empty(0, dtype=np.int64),
            profile_u=np.empty(0),
        )
    high, bounds = _ways(recipe.masked_fraction, recipe.uniform_prob, recipe.profile_prob, recipe.same_prob)
    first = random.skip(num_centres * length)
    where = random.key, first, (num_centres, length), columns, high, bounds
    drawn = draw_kernel.mask(*where) or _mask_by_numpy(*where)
    return MaskDraw(action=drawn[0], profile_at=drawn[1], profile_u=drawn[2])


@functools.lru_cache(maxsize=64)
def _ways(
    masked: float, uniform: float, profile: float, same: float
) -> tuple[int, tuple[float, float, float, float, float]]:
    """Returns ``high`` and ``bounds`` of `draw_kernel.mask` for a recipe's fractions."""
    to_profile = uniform + profile
    scale = NUM_AMINO_ACIDS / uniform if uniform else 0.0
    # Of the high halves; 2**32 of them are all there are.
    high = round(masked * 2**32)
    return high, (uniform, to_profile, to_profile + same, scale, max(profile, 2.0**-32))


def _mask_by_numpy(
    key: tuple[int, int],
    first: int,
    shape: tuple[int, int],
    columns: tuple[int, int],
    high: int,
    bounds: tuple[float, float, float, float, float],
) -> draw_kernel.Masking:
    """Returns what `draw_kernel.mask` does, for the same arguments."""
    to_uniform, to_profile, to_same, scale, width = bounds
    words = words_by_numpy(key, first, shape[0] * shape[1]).reshape(shape)[:, columns[0] : columns[1]]
    masked = np.flatnonzero((words >> np.uint64(32)) < np.uint64(high))
    # u is cut at the bounds of the four ways; within a way what is left of u serves as a fresh uniform
    # number.
    u = (words.ravel()[masked] & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
    chosen = np.full(masked.shape, alphabet.MASK, dtype=np.uint8)
    chosen[u < to_same] = SAME
    chosen[u < to_profile] = FROM_PROFILE
    uniform = u < to_uniform
    chosen[uniform] = np.minimum((u[uniform] * scale).astype(np.uint8), NUM_AMINO_ACIDS - 1)
    action = np.full(words.shape, NOT_MASKED, dtype=np.uint8)
    action.reshape(-1)[masked] = chosen
    from_profile = chosen == FROM_PROFILE
    rest = (u[from_profile] - to_uniform) / width
    return action, masked[from_profile], rest.clip(0.0, 1.0 - 2.0**-53)


def _scale(word: int, bound: int) -> int:
    """Returns a word scaled to ``range(bound)``."""
    return ((word >> 32) * bound) >> 32
