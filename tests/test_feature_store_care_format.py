"""The digests of the index are what FORMAT.md says: computed here from its text, with nothing of foldfeed."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
from damage import make_store

from foldfeed.feature_store.care.compact import compact


def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def unsealed(path: Path) -> dict:
    document = json.loads(path.read_bytes())
    assert document.pop("sha256") == sha256(canonical(document))
    return document


def test_every_digest_of_log_tags_and_retention(tmp_path):
    store = make_store(tmp_path / "s")
    compact(store.url)
    root = Path(store.url)
    live: set[str] = set()
    parent, schema, checksums = "", "", []
    logs = sorted((root / "index/_delta_log").glob("*.json"))
    assert len(logs) == 8
    for version, path in enumerate(logs):
        actions: dict[str, list] = {}
        for line in path.read_text().splitlines():
            ((kind, action),) = json.loads(line).items()
            actions.setdefault(kind, []).append(action)
        (info,) = actions["commitInfo"]
        fields = {
            key: info[key] for key in info if key.startswith("foldfeed.") and key != "foldfeed.checksum"
        }
        added = {action["path"]: [action["size"], action["stats"]] for action in actions.get("add", [])}
        removed = sorted(action["path"] for action in actions.get("remove", []))
        jobs = sorted(action["appId"] for action in actions.get("txn", []))
        document = {"version": version, "fields": fields, "added": added, "removed": removed, "jobs": jobs}
        assert info["foldfeed.checksum"] == sha256(canonical(document))
        assert info["foldfeed.parent"] == parent
        live = (live - set(removed)) | set(added)
        assert info["foldfeed.files_sha256"] == sha256("".join(f"{name}\n" for name in sorted(live)).encode())
        assert info["foldfeed.settings_sha256"] == sha256((root / "foldfeed.json").read_bytes())
        for action in actions.get("metaData", []):
            schema = sha256(canonical(json.loads(action["schemaString"])))
        assert info["foldfeed.schema_sha256"] == schema
        for name in added:
            assert name == sha256((root / "index" / name).read_bytes()) + ".parquet"
        rows = sum(pq.read_metadata(root / "index" / name).num_rows for name in live)
        assert info["foldfeed.num_records"] == str(rows)
        parent = sha256(path.read_bytes())
        checksums.append(info["foldfeed.checksum"])
    tag = unsealed(root / "tags/paper.json")
    assert (tag["name"], tag["commit"]) == ("paper", checksums[tag["version"]])
    assert unsealed(root / "retention.json") == {"oldest_version": 1}
