"""A second reader of the store, written from FORMAT.md alone: zarr-python and pyarrow, nothing of foldfeed.

It reads everything, slowly and plainly. It exists so that the format's text and the format's code cannot
drift apart.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr

TEMPLATE_NUMBERS = ("release_date", "e_value", "score", "probability", "sum_probs", "resolution")


def permuted_ranks(seed: int, record_id: str, depth: int) -> list[int]:
    """The rank of every stored row, by FORMAT.md, "Row order"."""
    n = depth - 1
    word = int.from_bytes(hashlib.sha256(record_id.encode()).digest()[:8], "big")
    message = json.dumps(["foldfeed/permutation/1", seed, word, depth], separators=(",", ":"))
    keys = hashlib.shake_256(message.encode()).digest(192)
    numbers = [int.from_bytes(keys[8 * i : 8 * i + 8], "little") for i in range(24)]
    b = max(4, (n - 1).bit_length())
    right, left = (b + 1) // 2, b // 2

    def mixed(v: int, key: int, bits: int) -> int:
        x = (v + key) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x ^ x >> 31) >> (64 - bits)

    def f(v: int) -> int:
        for i in range(12):
            if i % 2 == 0:
                v ^= mixed(v % 2**right, numbers[i], left) << right
            else:
                v ^= mixed(v >> right, numbers[i], right)
            v = (v + numbers[12 + i]) % 2**b
        return v

    ranks = [0]
    for i in range(n):
        v = f(i)
        while v >= n:
            v = f(v)
        ranks.append(1 + v)
    return ranks


class ConformanceReader:
    def __init__(self, url: str) -> None:
        self.root = Path(url)
        about = json.loads((self.root / "foldfeed.json").read_text())
        assert (about["format"], about["version"]) == ("foldfeed", 1)
        self.row_order = about["settings"]["row_order"]
        assert self.row_order in ("rank", "permuted")
        self.seed = about["settings"].get("row_order_seed")
        assert (self.seed is None) == (self.row_order == "rank")
        self.tile_rows = about["settings"]["tile_rows"]
        self.tile_cols = about["settings"]["tile_cols"]
        self.rows = {
            row["record_id"]: row for path in self._live_files() for row in pq.read_table(path).to_pylist()
        }

    def _live_files(self) -> list[Path]:
        """Replays the Delta log: files that were added and not removed."""
        live = {}
        for log in sorted((self.root / "index" / "_delta_log").glob("*.json")):
            for line in log.read_text().splitlines():
                action = json.loads(line)
                if "add" in action:
                    live[action["add"]["path"]] = self.root / "index" / action["add"]["path"]
                elif "remove" in action:
                    live.pop(action["remove"]["path"], None)
        return list(live.values())

    def part(self, part_id: str) -> zarr.Group:
        folder = self.root / "parts" / part_id
        group = (folder / "zarr.json").read_bytes()
        assert hashlib.sha256(group).hexdigest()[:40] == part_id
        for path, entry in json.loads(group)["attributes"]["foldfeed"]["files"].items():
            data = (folder / path).read_bytes()
            assert len(data) == entry["bytes"]
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        return zarr.open_group(str(folder), mode="r")

    def alignment(self, record_id: str) -> tuple[np.ndarray, np.ndarray]:
        row = self.rows[record_id]
        group = self.part(row["part_id"])
        depth, length, first = row["depth"], row["length"], row["first_tile"]
        bands, across = -(-depth // self.tile_rows), -(-length // self.tile_cols)
        msa = np.zeros((depth, length), np.uint8)
        deletions = np.zeros((depth, length), np.int32)
        for name, out in (("msa", msa), ("deletion", deletions)):
            tiles = group[name][first : first + bands * across]
            tiles = tiles.reshape(bands, across, self.tile_rows, self.tile_cols)
            whole = tiles.transpose(0, 2, 1, 3).reshape(bands * self.tile_rows, across * self.tile_cols)
            out[:] = whole[:depth, :length]
            assert (whole[depth:] == (255 if name == "msa" else 0)).all()
            assert (whole[:, length:] == (255 if name == "msa" else 0)).all()
        start = row["first_overflow"]
        entries = group["deletion_overflow"][start : start + row["num_overflow"]]
        assert (np.diff(entries[:, 0]) > 0).all()
        for cell, count in entries.tolist():
            tile, position = divmod(cell, self.tile_rows * self.tile_cols)
            band, col_tile = divmod(tile, across)
            in_row, in_col = divmod(position, self.tile_cols)
            place = band * self.tile_rows + in_row, col_tile * self.tile_cols + in_col
            assert deletions[place] == 255
            deletions[place] = count
        if self.row_order == "permuted":
            ranks = permuted_ranks(self.seed, record_id, depth)
            # Stored row i is the row of rank ranks[i]: in order of rank, the inverse.
            stored = np.argsort(ranks)
            return msa[stored], deletions[stored]
        return msa, deletions

    def fingerprint(self, record_id: str) -> str:
        row = self.rows[record_id]
        group = self.part(row["part_id"])
        msa, deletions = self.alignment(record_id)
        lines = slice(row["first_row"], row["first_row"] + row["depth"])
        hit_ids, start = [], row["first_hit_id_byte"]
        for size in group["row_hit_id_bytes"][lines].tolist():
            hit_ids.append(group["row_hit_id"][start : start + size].tobytes())
            start += size
        species = [name.tobytes().rstrip(b"\0") for name in group["row_species"][lines]]
        head = {name: row[name] for name in ("databases", "depth", "description", "record_id", "sequence")}
        head["extra"] = json.loads(row["extra"])
        digest = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
        digest.update(msa.tobytes() + deletions.tobytes())
        for name in ("row_database", "row_e_value", "row_bit_score"):
            digest.update(group[name][lines].tobytes())
        digest.update(b"\0".join(hit_ids) + b"\0".join(species))
        keys = self.pairing_keys(record_id)
        if any(keys):
            digest.update(b"\0".join([b"pairing_key", *keys]))
        if "row_taxonomy_id" in group and group["row_taxonomy_id"][lines].any():
            digest.update(b"taxonomy_id" + group["row_taxonomy_id"][lines].tobytes())
        if row["structure"] is not None:
            digest.update(self.structure_fingerprint(record_id).encode())
        if row["templates"] is not None:
            digest.update(b"templates " + self.templates_fingerprint(record_id).encode())
        return digest.hexdigest()

    def templates(self, record_id: str) -> list[dict]:
        """Every hit: its numbers, id, sequence and runs, by FORMAT.md, "Templates"."""
        row = self.rows[record_id]
        group = self.part(row["part_id"])
        byte, residue, run = (row[f"first_template_{name}"] for name in ("id_byte", "residue", "run"))
        found = []
        for at in range(row["first_template"], row["first_template"] + row["num_templates"]):
            hit = {name: group[f"template_{name}"][at] for name in TEMPLATE_NUMBERS}
            size, length, runs = (
                int(group[f"template_{name}"][at]) for name in ("id_bytes", "num_residues", "num_runs")
            )
            hit["id"] = group["template_id"][byte : byte + size].tobytes()
            hit["sequence"] = group["template_sequence"][residue : residue + length].tobytes()
            hit["runs"] = group["template_run"][run : run + runs]
            byte, residue, run = byte + size, residue + length, run + runs
            found.append(hit)
        return found

    def templates_fingerprint(self, record_id: str) -> str:
        row, hits = self.rows[record_id], self.templates(record_id)
        source = json.dumps(json.loads(row["templates"]), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(source.encode())
        digest.update(b"\0".join(hit["id"] for hit in hits) + b"\0".join(hit["sequence"] for hit in hits))
        for name in TEMPLATE_NUMBERS:
            digest.update(b"".join(hit[name].tobytes() for hit in hits))
        digest.update(b"".join(np.int32(len(hit["runs"])).tobytes() for hit in hits))
        digest.update(b"".join(hit["runs"].tobytes() for hit in hits))
        return digest.hexdigest()

    def pairing_keys(self, record_id: str) -> list[bytes]:
        row = self.rows[record_id]
        group = self.part(row["part_id"])
        lines = slice(row["first_row"], row["first_row"] + row["depth"])
        if "row_pairing_key" not in group:
            return [b""] * row["depth"]
        return [name.tobytes().rstrip(b"\0") for name in group["row_pairing_key"][lines]]

    def structure(self, record_id: str) -> dict[str, np.ndarray]:
        row = self.rows[record_id]
        group = self.part(row["part_id"])
        first = row["first_structure_residue"]
        names = ("atom_positions", "atom_mask", "b_factor", "residue_number", "insertion_code")
        return {name: group[name][first : first + row["length"]] for name in names}

    def structure_fingerprint(self, record_id: str) -> str:
        source = json.loads(self.rows[record_id]["structure"])
        digest = hashlib.sha256(json.dumps(source, sort_keys=True, separators=(",", ":")).encode())
        for values in self.structure(record_id).values():
            digest.update(values.tobytes())
        return digest.hexdigest()

    def per_residue(self, record_id: str, name: str) -> np.ndarray:
        row = self.rows[record_id]
        first = row["first_residue"]
        return self.part(row["part_id"])[name][first : first + row["length"]]
