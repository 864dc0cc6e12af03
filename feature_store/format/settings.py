"""Settings of a store: what is chosen once, at creation, and holds for every part in it.

They live in ``STORE/foldfeed.json``. This module owns their meaning and their JSON form, not the files.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from foldfeed.feature_store.errors import FormatVersionError, NotAStoreError

FORMAT_NAME = "foldfeed"
FORMAT_VERSION = 1
SUPPORTED_VERSIONS = (1,)
SETTINGS_FILE = "foldfeed.json"
MAX_TILE_CELLS = 1 << 22
RANK = "rank"
PERMUTED = "permuted"
ROW_ORDERS = (RANK, PERMUTED)
# Whatever reads JSON numbers as float64 reads these exactly.
MAX_ROW_ORDER_SEED = 2**53 - 1
# Rows of a tile that `StoreSettings.with_row_order` chooses. Over the real MSAs and the loader's own plans a
# uniform sample of up to 1,152 rows x 256 residues of a permuted store reads 1.31 times the bytes that its
# tokens cost with tiles of 128 rows, 1.52 with 256 and 1.90 with 512; 64 rows give 1.20 and store 5 % more
# than 128 (bench/tile_layout.py).
ROW_ORDER_TILE_ROWS = {RANK: 512, PERMUTED: 128}
# What is fast in which order, in the words of `foldfeed show`. Of 16,384 random rows x 256 residues the first
# 512 ranks are 0.09 MB in a store of ranks and 2.7 MB in a permuted one; 512 uniform rows are 2.7 MB in both
# when they are asked for by rank, and 0.11 MB as a slab of the permuted one (`Record.plan`).
ROW_ORDER_USES = {
    RANK: "reads the best hits (rows 0:N) and runs of ranks fast; random rows touch every tile",
    PERMUTED: "reads random samples of rows fast (record.slab, StoredRun, recipe crop_first); the best hits "
    "(rows 0:N) are spread over every tile, so keep a store of order rank for those",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """How alignments are cut into tiles.

    A tile is the unit of reading: 512 rows x 64 columns of one alignment. On 89 real MSAs (58 M tokens) that
    shape pads 1.26x and compresses 3.24x with rows in rank order; 128 x 64 pads less (1.19x) but compresses
    less too (2.96x), and a crop of 512 rows would touch four times as many tiles.

    Attributes:
      tile_rows: rows of a tile.
      tile_cols: residues (columns) of a tile.
      row_order: in which order the rows of an alignment lie in its tiles. ``rank``: as the search ranked
        them. ``permuted``: in an order that is random, known and the record's own (see `row_order`), so that
        a uniform sample of rows is one contiguous run. The query is the first row in both, and readers see
        ranks in both.
      row_order_seed: of ``permuted``, 0 to 2**53 - 1, 0 when None is given; None for ``rank``, where it would
        have no effect.
    """

    tile_rows: int = ROW_ORDER_TILE_ROWS[RANK]
    tile_cols: int = 64
    row_order: str = RANK
    row_order_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("tile_rows", "tile_cols"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} {value!r} is not possible; it is an integer")
        if self.tile_rows < 1 or self.tile_cols < 1 or self.tile_rows * self.tile_cols > MAX_TILE_CELLS:
            raise ValueError(
                f"a tile of {self.tile_rows} x {self.tile_cols} is not possible: both sides are at least 1 "
                f"and their product at most {MAX_TILE_CELLS}"
            )
        if self.row_order not in ROW_ORDERS:
            raise ValueError(f"row_order {self.row_order!r} is unknown; it is one of {', '.join(ROW_ORDERS)}")
        if self.row_order == RANK:
            if self.row_order_seed is not None:
                raise ValueError(
                    f"row_order_seed {self.row_order_seed!r} has no effect with row_order {RANK!r}; leave it "
                    f"out, or choose row_order {PERMUTED!r}"
                )
            return
        if self.row_order_seed is None:
            object.__setattr__(self, "row_order_seed", 0)
        seed = self.row_order_seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_ROW_ORDER_SEED:
            raise ValueError(
                f"row_order_seed {seed!r} is not possible; it is an integer from 0 to {MAX_ROW_ORDER_SEED}"
            )

    @classmethod
    def with_row_order(cls, row_order: str, seed: int | None = None) -> StoreSettings:
        """Returns the settings that measured best for a row order.

        Args:
          row_order: ``rank`` or ``permuted``.
          seed: see ``row_order_seed``.
        Raises:
          ValueError: an unknown order, or a seed that has no effect or is out of range.
        """
        tile_rows = ROW_ORDER_TILE_ROWS.get(row_order, ROW_ORDER_TILE_ROWS[RANK])
        return cls(tile_rows=tile_rows, row_order=row_order, row_order_seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as they stand in JSON; ``row_order_seed`` only where it has a meaning."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def to_json(self) -> bytes:
        """Returns the content of ``foldfeed.json``, the same bytes for equal settings."""
        document = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "settings": self.to_dict()}
        return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, url: str) -> StoreSettings:
        """Returns the settings in the bytes of a ``foldfeed.json``.

        Args:
          data: the file.
          url: the store, for messages.
        Raises:
          NotAStoreError: it is not such a file.
          FormatVersionError: it is one, of a version this software does not read.
        """
        try:
            document = json.loads(data)
        except ValueError as error:
            raise NotAStoreError(url, f"{SETTINGS_FILE} is not JSON ({error})") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
            raise NotAStoreError(url, f"{SETTINGS_FILE} does not say 'format': '{FORMAT_NAME}'")
        if document.get("version") not in SUPPORTED_VERSIONS:
            raise FormatVersionError(url, document.get("version"), SUPPORTED_VERSIONS)
        try:
            return cls(**document["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise NotAStoreError(
                url, f"{SETTINGS_FILE} has settings this release cannot read ({error})"
            ) from error
