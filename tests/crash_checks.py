"""What must hold after a kill, for every scenario of crash_harness.py."""

import dataclasses
import importlib.util
import shutil
import time
from pathlib import Path

from crash_harness import Server, bytes_of_parts, files_of

from foldfeed.feature_store import FeatureStore, NotAStoreError
from foldfeed.feature_store.care.garbage import collect_garbage
from foldfeed.feature_store.care.verify import verify

# What has happened in the store before the scenario that is interrupted.
BEFORE = {
    "create": (),
    "commit": ("old",),
    "replace": ("old",),
    "delete": ("old",),
    "compact": ("old",),
    "gc": ("old", "garbage"),
    "drop": ("old", "compact"),
    "tag": ("old",),
    "copy": (),
}
if importlib.util.find_spec("gemmi") is not None:
    BEFORE["structures"] = ("old",)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A store as others see it.

    Attributes:
      content: fingerprint by record id, or None when there is no store.
      files: paths of all files after `gc`.
    """

    content: dict[str, str] | None
    files: frozenset[str]


class Case:
    """One scenario: the store before, the store after, how many steps and seconds lie between."""

    def __init__(self, server: Server, name: str, folder: Path) -> None:
        self.name = name
        self._server = server
        self._folder = folder
        self._base = folder / name / "base"
        self._number = 0
        if name == "copy":
            assert server.run("old", Path(f"{self._base}-source"))[0] == 0
        for step in BEFORE[name]:
            if step == "garbage":
                _make_garbage(self._base)
            else:
                assert server.run(step, self._base)[0] == 0
        self.before = self._state(self._copied())
        done = self._copied()
        started = time.monotonic()
        status, self.steps = server.run(name, done)
        self.seconds = time.monotonic() - started
        assert status == 0
        self.after = self._state(done)
        self._parts = bytes_of_parts(done)
        self._between: list[State] = []
        if name == "copy":
            # A copy makes an empty store first.
            empty = self._copied()
            assert server.run("create", empty)[0] == 0
            self._between.append(self._state(empty))

    def kill(self, *, step: int = -1, torn: bool = False, after_s: float = -1.0) -> str:
        """Interrupts the scenario, checks all, runs it again; returns ``before``, ``after`` or ``done``."""
        root = self._copied()
        status, _ = self._server.run(self.name, root, step=step, torn=torn, after_s=after_s)
        assert status in (0, -9), f"the child ended with {status}"
        now = self._state(root)
        where = f"{self.name}, step {step}, torn {torn}, after {after_s}"
        allowed = (self.before, self.after, *self._between)
        assert now in allowed, f"{where}: neither the state before nor the one after"
        assert self._server.run(self.name, root)[0] == 0, f"{where}: it cannot be run again"
        assert self._state(root) == self.after, f"{where}: run again it ends differently"
        assert bytes_of_parts(root) == self._parts, f"{where}: run again the parts differ"
        shutil.rmtree(root)
        if status == 0:
            return "done"
        return "after" if now == self.after else "before"

    def _state(self, root: Path) -> State:
        """Returns what is visible, after checking all of it and taking the garbage out."""
        try:
            store = FeatureStore.open(root)
        except NotAStoreError:
            assert self.name in ("create", "copy")
            return State(content=None, files=frozenset())
        content = {name: store[name].fingerprint for name in store.ids}
        assert verify(root, level="full").problems == ()
        _read_all(store)
        kept = collect_garbage(root, grace_s=0)
        assert kept.spared == ()
        assert collect_garbage(root, grace_s=0).removed == ()
        _read_all(FeatureStore.open(root))
        return State(content=content, files=frozenset(files_of(root)))

    def _copied(self) -> Path:
        self._number += 1
        root = self._folder / self.name / f"run-{self._number}"
        root.parent.mkdir(parents=True, exist_ok=True)
        if self._base.exists():
            shutil.copytree(self._base, root)
        source = Path(f"{self._base}-source")
        if source.exists():
            Path(f"{root}-source").symlink_to(source)
        return root


def _read_all(store: FeatureStore) -> None:
    for name in store.ids:
        record = store[name]
        assert record.msa().shape == record.deletions().shape == (record.depth, record.length)
        assert len(record.rows()) == record.depth


def _make_garbage(root: Path) -> None:
    """What killed writers leave: a part that nothing names, staging folders, stray files."""
    from records import make_record

    from foldfeed.feature_store import write_part

    write_part(root, [make_record("never-committed", 5, 9)], FeatureStore.open(root).settings)
    (root / "parts" / ".tmp-left" / "msa").mkdir(parents=True)
    (root / "parts" / ".tmp-left" / "msa" / "half").write_bytes(b"x" * 100)
    (root / "index" / f"{'0' * 64}.parquet").write_bytes(b"an index file of a commit that never was")
    (root / "index" / "_delta_log" / ".tmp-x").write_bytes(b"x")
    (root / "index" / "_delta_log" / "00000000000000000003.json#1").write_bytes(b"{")
