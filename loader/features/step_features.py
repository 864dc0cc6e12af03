"""`step_features`: the features of all samples of a step at once, from one block of bytes on a device.

What `features.featurise.featurise` makes of one sample, with a leading axis for the samples and the
same numbers. The operations are the same few whatever the samples are: each array is gathered from the block
by index arithmetic into (samples, rows, columns), zero where a sample has nothing, and all that follows is
elementwise or a batched matrix product. Sizes come from the host, so no operation waits for a device, and
none has a shape that depends on data.

Two products count. Agreement is (one-hot members) x (one-hot centres); a cluster's residues are (which member
is whose) x (one-hot members). Their factors are 0 and 1, so half precision is exact as long as no sum exceeds
2,048, which blocks of columns and rows see to. Deletions are summed as a product in float64, exact below
2**53. So nothing is added up in an order that a device chooses, and atomics are not needed either: kernels
are deterministic. Values equal those of the CPU to the bit, but for the arc tangent, whose last bit may
differ between devices.

Thread safe (pure functions). Shape legend: B samples, C centres (or rows), E extra rows, R residues of the
crop, all of the recipe; W columns, M members, K replaced positions, the most of any sample; m members of a
block.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.structure import NUM_ATOMS
from foldfeed.loader.features.clusters import NUM_CLASSES, NUM_COUNTED
from foldfeed.loader.features.featurise import NUM_AATYPES, deletion_value
from foldfeed.loader.features.forms import COMPACT, FULL, Features, compact_dtype
from foldfeed.loader.features.step_block import NO_CODE, NO_CODE_AT, StepSizes
from foldfeed.loader.features.structure_labels import label_features
from foldfeed.loader.features.templates import template_slots
from foldfeed.loader.reading.packed import HEADER
from foldfeed.loader.reading.plan import FROM_PROFILE, NOT_MASKED, SAME
from foldfeed.loader.reading.ring import ALIGNMENT
from foldfeed.loader.recipe import AF3, MASKED_LM, Recipe

# Bytes of the one-hot rows of a block of members; of AlphaFold 2's usual steps all members fit in one.
ONE_HOT_BLOCK_BYTES = 512 << 20
# Half precision holds every whole number up to here.
HALF_EXACT = 2048
# Lengths of the tables of whole numbers: the next power of two of what a step needs, at least this.
FEWEST_NUMBERS = 4096


def step_features(block: torch.Tensor, sizes: StepSizes, recipe: Recipe, form: str = FULL) -> Features:
    """Returns the features of a step's samples, with a leading axis for the samples.

    Args:
      block: uint8 (bytes,), from `features.step_block.StepBlock`, on any device.
      sizes: of the block.
      recipe: for the kind and the shapes.
      form: one of `features.forms.FORMS`.
    Returns: see `features.featurise.featurise`, or that in another form, see
      `features.forms.compact_features`; fresh tensors on the block's device, in the order of
      the step.
    """
    step = _Step(block, sizes, recipe, form)
    step.add_target()
    if recipe.name == AF3:
        step.add_rows()
    elif recipe.name == MASKED_LM:
        step.add_masked_rows()
    else:
        step.add_clusters()
        step.add_extra()
    if recipe.labels:
        step.add_labels()
    return step.features | template_slots(recipe, block.device, (sizes.num_samples,))


def product_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of the factors 0 and 1 of products: the fastest on a GPU, a usual one elsewhere."""
    return torch.float16 if device.type == "cuda" else torch.float32


class _Step:
    """Features of a step as they come into being.

    Attributes:
      features: what is there.
    """

    def __init__(self, block: torch.Tensor, sizes: StepSizes, recipe: Recipe, form: str) -> None:
        self.features: Features = {}
        self._recipe = recipe
        self._sizes = sizes
        self._is_compact = form == COMPACT
        self._device = block.device
        longest = max(
            *(recipe.crop_residues + 1, recipe.num_clusters, recipe.num_extra, 3 * NUM_ATOMS),
            *(sizes.columns, sizes.members, sizes.replaced),
        )
        self._numbers = _numbers(self._device, 1 << (max(longest, FEWEST_NUMBERS) - 1).bit_length())
        self._classes = _numbers(self._device, NUM_CLASSES, torch.uint8)
        self._flat = {
            dtype: block.view(dtype)
            for dtype in (torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64)
        }
        first, num_words = ALIGNMENT // 8, sizes.num_samples * len(HEADER)
        header = self._flat[torch.int64][first : first + num_words]
        self._header = header.view(sizes.num_samples, len(HEADER))
        self._residue = self._range(recipe.crop_residues)
        self._is_residue = self._residue < self._of("residues")
        # Columns of the crop among those read, (B, R); 0 where there is no residue.
        self._crop = self._where(self._is_residue, self._residue + self._of("crop_start"))
        self._slot = self._range(recipe.num_clusters)
        self._is_slot = self._slot < self._of("centres")
        self._is_cell = self._is_slot[:, :, None] & self._is_residue[:, None]

    @functools.cached_property
    def _centres(self) -> torch.Tensor:
        """Which rows read are the centres, int64 (B, C)."""
        return self._read("centre_at", torch.int64, self._slot, self._is_slot)

    @functools.cached_property
    def _centre_deletions(self) -> torch.Tensor:
        """Their deletion counts, int32 (B, C, R)."""
        return self._crop_deletions(self._centres, self._is_cell)

    def add_target(self) -> None:
        """Adds what describes the query."""
        aatype = self._read("aatype", torch.uint8, self._residue, self._is_residue)
        index = self._where(self._is_residue, self._residue + self._of("first_residue"))
        self._put("aatype", aatype, torch.int64)
        self._put("residue_index", index, torch.int64)
        self._put("seq_mask", self._is_residue, torch.float32)
        if not self._is_compact:
            one_hot = self._one_hot(aatype, NUM_AATYPES, self._is_residue)
            self._put("target_feat", functional.pad(one_hot, (1, 0)), torch.float32)

    def add_rows(self) -> None:
        """Adds AlphaFold 3's features of the rows; it reads no columns but the crop's."""
        self._put("msa", self._crop_codes(self._centres, self._is_cell), torch.int64)
        self._put("msa_mask", self._is_cell, torch.float32)
        self._put_deletions("", self._centre_deletions)
        tokens = self._range(alphabet.NUM_TOKENS)
        at = self._crop[:, :, None] * alphabet.NUM_TOKENS + tokens
        is_residue = self._is_residue[:, :, None].expand_as(at)
        self._put("profile", self._read("profile", torch.float32, at, is_residue), torch.float32)
        means = self._read("deletion_mean", torch.float32, self._residue, self._is_residue)
        self._put("deletion_mean", means, torch.float32)

    def add_masked_rows(self) -> None:
        """Adds rows for a masked language model."""
        self._put("msa", self._in_cells(self._add_truth()), torch.int64)

    def add_clusters(self) -> None:
        """Adds AlphaFold 2's features of the clustered MSA."""
        masked = self._add_truth()
        centres = self._in_cells(masked)
        profile, mean = self._summarised(masked, centres)
        mean_value = deletion_value(mean)
        deletions = self._centre_deletions
        if self._is_compact:
            self._put("msa", centres, torch.int64)
            self._put_deletions("", deletions)
            self._put("cluster_profile", profile, torch.float32)
            self._put("cluster_deletion_value", mean_value, torch.float32)
            return
        parts = (
            self._one_hot(centres, NUM_CLASSES, self._is_cell).to(torch.float32),
            deletions.clamp(0, 1).to(torch.float32)[..., None],
            deletion_value(deletions)[..., None],
            profile,
            mean_value[..., None],
        )
        self.features["msa_feat"] = torch.cat(parts, dim=-1)

    def add_extra(self) -> None:
        """Adds the extra MSA."""
        rows, is_row = self._rows("extra_at", self._range(self._recipe.num_extra), "extras")
        is_cell = is_row[:, :, None] & self._is_residue[:, None]
        self._put("extra_msa", self._crop_codes(rows, is_cell), torch.int64)
        self._put("extra_msa_mask", is_cell, torch.float32)
        self._put_deletions("extra_", self._crop_deletions(rows, is_cell))

    def add_labels(self) -> None:
        """Adds what the structures teach; zeros for samples that were read without labels."""
        # One residue more than the crop has: the one before it.
        residue = self._range(self._recipe.crop_residues + 1)
        is_residue = residue < self._of("with_atoms")
        mask = self._atoms("atom_mask", torch.uint8, residue, is_residue, NUM_ATOMS)
        positions = self._atoms("atom_positions", torch.float32, residue, is_residue, 3 * NUM_ATOMS)
        labels = label_features(
            self._read("aatype", torch.uint8, self._residue, self._is_residue),
            positions.unflatten(2, (NUM_ATOMS, 3)),
            mask,
            self._single("resolution"),
        )
        # The frame of a residue without atoms is the identity; behind the crop there is none.
        frames = labels["backbone_rigid_tensor"]
        labels["backbone_rigid_tensor"] = self._where(is_residue[:, 1:, None, None], frames)
        for name, value in labels.items():
            self._put(name, value, value.dtype)
        self.features["use_clamped_fape"] = self._single("clamped")[:, 0]

    def _add_truth(self) -> torch.Tensor:
        """Adds what was masked, and returns the masked centres, uint8 (B, C, W)."""
        codes = self._codes(self._centres, self._is_slot)
        action = self._all_columns("action", self._slot, self._is_slot)
        is_target = self._cropped(action) != NOT_MASKED
        self._put("true_msa", self._in_cells(codes), torch.int64)
        self._put("bert_mask", is_target & self._is_cell, torch.float32)
        self._put("msa_mask", self._is_cell, torch.float32)
        # Smaller actions are the codes that take a residue's place.
        replaced = torch.where(action >= SAME, codes, action)
        is_drawn = action == FROM_PROFILE
        return torch.where(is_drawn, self._drawn_tokens(is_drawn), replaced)

    def _drawn_tokens(self, is_drawn: torch.Tensor) -> torch.Tensor:
        """Returns uint8 (B, C, W), where ``is_drawn`` the token that was drawn from the column's profile.

        They are drawn in the order of rows and columns, so the n-th such place has the n-th token. That is
        looked up rather than scattered: of two ways to scatter, torch's deterministic one sorts.
        """
        width, tokens = self._sizes.columns, self._range(alphabet.NUM_TOKENS)
        at = self._range(width)[:, None] * alphabet.NUM_TOKENS + tokens
        is_column = (self._range(width) < self._of("columns"))[..., None]
        profile = self._read("profile", torch.float32, at, is_column.expand(-1, *at.shape))
        # Shares of whole rows: their sums are exact in float64 (below 2**29 rows), in any order.
        cumulative = profile.to(torch.float64) @ _upper(self._device)
        drawn = self._range(self._sizes.replaced)
        exists = drawn < self._of("replaced")
        place = self._read("profile_at", torch.int64, drawn, exists)
        u = self._read("profile_u", torch.float64, drawn, exists)
        column = place % self._of("columns")
        chosen = cumulative.gather(1, column[..., None].expand(-1, -1, len(tokens)))
        token = (chosen <= u[..., None] * chosen[..., -1:]).sum(dim=-1).to(torch.uint8)
        # How many are drawn up to here: 1 for the first.
        number = is_drawn.flatten(1).cumsum(dim=1)
        return functional.pad(token, (1, 0)).gather(1, number).view_as(is_drawn)

    def _summarised(self, masked: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns float32 (B, C, R, 23) and (B, C, R): profile and mean deletion count of each cluster.

        Args:
          masked: uint8 (B, C, W), centres in all columns read.
          centres: uint8 (B, C, R), in the crop.
        """
        num_samples, width = self._sizes.num_samples, self._sizes.columns
        dtype = product_dtype(self._device)
        # A centre counts with its masked residues.
        counts = self._one_hot(centres, NUM_CLASSES, self._is_cell).to(torch.float32)
        sums = self._centre_deletions.to(torch.float64)
        num_members = torch.zeros(self._is_slot.shape, dtype=torch.float32, device=self._device)
        row_bytes = num_samples * width * NUM_COUNTED * dtype.itemsize
        size = max(1, min(HALF_EXACT, ONE_HOT_BLOCK_BYTES // row_bytes))
        for member in self._range(self._sizes.members).split(size):
            rows, is_row = self._rows("member_at", member, "members")
            codes = self._codes(rows, is_row)
            nearest = self._nearest(codes, masked, dtype)
            is_whose = (nearest[..., None] == self._slot) & is_row[..., None]
            whose = is_whose.to(dtype).mT
            crop = self._where(self._is_residue[:, None], self._cropped(codes), NO_CODE)
            residues = self._one_hot(crop, alphabet.NUM_TOKENS).to(dtype).flatten(2)
            added = (whose @ residues).to(torch.float32).unflatten(2, (-1, alphabet.NUM_TOKENS))
            counts = counts + functional.pad(added, (0, NUM_CLASSES - alphabet.NUM_TOKENS))
            is_cell = is_row[:, :, None] & self._is_residue[:, None]
            deletions = self._crop_deletions(rows, is_cell)
            sums = sums + is_whose.to(torch.float64).mT @ deletions.to(torch.float64)
            num_members = num_members + is_whose.sum(dim=1).to(torch.float32)
        # Float32 in AlphaFold 2's order of additions: (1e-6 + 1) + members.
        cluster_size = (_one(self._device) + num_members)[..., None]
        return counts / cluster_size[..., None], sums.to(torch.float32) / cluster_size

    def _nearest(self, codes: torch.Tensor, masked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns the centre that each member agrees with most, the first of equals, int64 (B, m).

        Args:
          codes: uint8 (B, m, W).
          masked: uint8 (B, C, W).
          dtype: of the product's factors.
        """
        agreement = torch.zeros((), dtype=torch.float32, device=self._device)
        for first in range(0, codes.shape[2], HALF_EXACT):
            columns = slice(first, first + HALF_EXACT)
            members = self._one_hot(codes[:, :, columns], NUM_COUNTED).to(dtype).flatten(2)
            centres = self._one_hot(masked[:, :, columns], NUM_COUNTED).to(dtype).flatten(2)
            agreement = agreement + (members @ centres.mT).to(torch.float32)
        return self._where(self._is_slot[:, None], agreement, -1).argmax(dim=2)

    def _put(self, name: str, value: torch.Tensor, usual: torch.dtype) -> None:
        dtype = compact_dtype(name, usual) if self._is_compact else usual
        self.features[name] = value.to(dtype).contiguous()

    def _put_deletions(self, prefix: str, deletions: torch.Tensor) -> None:
        self._put(f"{prefix}deletion_value", deletion_value(deletions), torch.float32)
        if not self._is_compact:
            self._put(f"{prefix}has_deletion", deletions.clamp(0, 1), torch.float32)

    def _rows(self, name: str, place: torch.Tensor, count: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns which rows read a list names, int64 (B, k), and which of its places exist, bool (B, k)."""
        is_row = place < self._of(count)
        return self._read(name, torch.int64, place, is_row), is_row

    def _codes(self, rows: torch.Tensor, is_row: torch.Tensor) -> torch.Tensor:
        """Returns all columns of rows, uint8 (B, k, W)."""
        return self._all_columns("msa", rows, is_row)

    def _all_columns(self, name: str, rows: torch.Tensor, is_row: torch.Tensor) -> torch.Tensor:
        """Returns uint8 (B, k, W), `NO_CODE` (which is `NOT_MASKED`) where a sample has nothing."""
        column = self._range(self._sizes.columns)
        is_cell = is_row[:, :, None] & (column < self._of("columns"))[:, None]
        first = self._of(name) + rows * self._of("columns")
        return self._taken(torch.uint8, first[..., None] + column, is_cell, NO_CODE_AT)

    def _crop_codes(self, rows: torch.Tensor, is_cell: torch.Tensor) -> torch.Tensor:
        """Returns the crop of rows (B, k), uint8 (B, k, R), 0 in what is no cell (B, k, R)."""
        first = self._of("msa") + rows * self._of("columns")
        return self._taken(torch.uint8, first[..., None] + self._crop[:, None], is_cell)

    def _crop_deletions(self, rows: torch.Tensor, is_cell: torch.Tensor) -> torch.Tensor:
        """Returns deletion counts of rows (B, k), int32 (B, k, R), 0 in what is no cell (B, k, R)."""
        first = self._of("deletions") + rows * self._of("residues")
        return self._taken(torch.int32, first[..., None] + self._residue, is_cell)

    def _atoms(
        self, name: str, dtype: torch.dtype, residue: torch.Tensor, is_residue: torch.Tensor, width: int
    ) -> torch.Tensor:
        """Returns (B, residues, width), numbers of residues."""
        at = residue[:, None] * width + self._range(width)
        return self._read(name, dtype, at, is_residue[..., None].expand(-1, -1, width))

    def _single(self, name: str) -> torch.Tensor:
        """Returns float32 (B, 1), one number of each sample."""
        return self._read(name, torch.float32, self._range(1), self._of("with_atoms") > 0)

    def _cropped(self, values: torch.Tensor) -> torch.Tensor:
        """Returns (B, k, R) of (B, k, W); behind the crop's end stands anything."""
        return values.gather(2, self._crop[:, None].expand(-1, values.shape[1], -1))

    def _in_cells(self, values: torch.Tensor) -> torch.Tensor:
        """Returns (B, C, R) of (B, C, W), zeros where a sample has no such centre or residue."""
        return self._where(self._is_cell, self._cropped(values))

    def _read(self, name: str, dtype: torch.dtype, at: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        """Returns elements of an array of each sample, 0 where there are none.

        Args:
          name: of the array.
          dtype: its dtype.
          at: int64 (...) or (B, ...), places in it.
          exists: bool (B, ...), where to read.
        """
        start = self._of(name).view(-1, *[1] * (exists.dim() - 1))
        return self._taken(dtype, start + at, exists)

    def _taken(
        self, dtype: torch.dtype, at: torch.Tensor, exists: torch.Tensor, nothing: int = 0
    ) -> torch.Tensor:
        """Returns elements of the block.

        Args:
          dtype: of them.
          at: int64 (B, ...), counted in elements from the block's first byte.
          exists: bool (B, ...), where to read.
          nothing: place in the block to read elsewhere, see `features.step_block`.
        """
        return self._flat[dtype].take(self._where(exists, at, nothing))

    def _where(self, condition: torch.Tensor, values: torch.Tensor, other: int = 0) -> torch.Tensor:
        """Returns the values where a condition holds, and one number elsewhere.

        The number lies on the device; `torch.where` would make it each time.
        """
        return torch.where(condition, values, _constant(self._device, other, values.dtype))

    def _one_hot(self, codes: torch.Tensor, size: int, exists: torch.Tensor | None = None) -> torch.Tensor:
        """Returns bool (..., size)."""
        one_hot = codes[..., None] == self._classes[:size]
        return one_hot if exists is None else one_hot & exists[..., None]

    def _of(self, name: str) -> torch.Tensor:
        """Returns a column of the header, int64 (B, 1)."""
        place = HEADER.index(name)
        return self._header[:, place : place + 1]

    def _range(self, size: int) -> torch.Tensor:
        """Returns int64 (size,): 0, 1, 2, ...; a view."""
        return self._numbers[:size]


# What stays on a device comes from the host, once: such a copy has happened when it returns, so that all
# streams may read it.


@functools.lru_cache(maxsize=256)
def _numbers(device: torch.device, size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.arange(size, dtype=dtype).to(device)


@functools.lru_cache(maxsize=256)
def _constant(device: torch.device, value: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((), value, dtype=dtype).to(device)


@functools.lru_cache(maxsize=64)
def _one(device: torch.device) -> torch.Tensor:
    """Returns float32 (), 1e-6 + 1 in that arithmetic."""
    return (torch.full((), 1e-6, dtype=torch.float32) + 1.0).to(device)


@functools.lru_cache(maxsize=64)
def _upper(device: torch.device) -> torch.Tensor:
    """Returns float64 (22, 22), ones on and above the diagonal: a product with it sums up to each token."""
    size = alphabet.NUM_TOKENS
    return torch.ones((size, size), dtype=torch.float64).triu().to(device)


# An action that does not exist masks nothing, and those that leave the code there are the largest.
assert alphabet.MASK < SAME < FROM_PROFILE < NOT_MASKED == NO_CODE
