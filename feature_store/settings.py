"""Settings of a store: what is chosen once, at creation, and holds for every part in it.

They live in ``STORE/foldfeed.json``. This module owns their meaning and their JSON form, not the files.
"""

from __future__ import annotations

import dataclasses
import json

from foldfeed.feature_store.errors import FormatVersionError, NotAStoreError

FORMAT_NAME = "foldfeed"
FORMAT_VERSION = 1
SUPPORTED_VERSIONS = (1,)
SETTINGS_FILE = "foldfeed.json"
MAX_TILE_CELLS = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """How alignments are cut into tiles.

    A tile is the unit of reading: 512 rows x 64 columns of one alignment. On 89 real MSAs (58 M tokens) that
    shape pads 1.26x and compresses 3.24x with rows in rank order; 128 x 64 pads less (1.19x) but compresses
    less too (2.96x), and a crop of 512 rows would touch four times as many tiles.

    Attributes:
      tile_rows: rows of a tile.
      tile_cols: residues (columns) of a tile.
      row_order: ``rank``: rows as the search ranked them, the query first. The only order of format v1 so
        far.
    """

    tile_rows: int = 512
    tile_cols: int = 64
    row_order: str = "rank"

    def __post_init__(self) -> None:
        if self.tile_rows < 1 or self.tile_cols < 1 or self.tile_rows * self.tile_cols > MAX_TILE_CELLS:
            raise ValueError(
                f"a tile of {self.tile_rows} x {self.tile_cols} is not possible: both sides are at least 1 "
                f"and their product at most {MAX_TILE_CELLS}"
            )
        if self.row_order != "rank":
            raise ValueError(f"row_order {self.row_order!r} is unknown; this release writes 'rank'")

    def to_json(self) -> bytes:
        """Returns the content of ``foldfeed.json``, the same bytes for equal settings."""
        document = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "settings": dataclasses.asdict(self)}
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
