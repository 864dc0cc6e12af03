"""What a power cut could take: a model of a folder's files, fed with the system calls of a traced program.

POSIX promises nothing about the order in which writes reach the disk, except through fsync: the data of a
file after an fsync of the file, a name in a folder after an fsync of the folder. The model keeps, for every
file and folder, what has not been promised yet.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from collections.abc import Iterable, Iterator

TRACED = (
    "openat,creat,write,pwrite64,writev,pwritev,ftruncate,fallocate,copy_file_range,sendfile,"
    "rename,renameat,renameat2,link,linkat,fsync,fdatasync,sync,syncfs,unlink,unlinkat,rmdir,mkdir,mkdirat"
)
_LINE = re.compile(r"(\d+)\s+(.*)")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>\s*(.*)")
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)(?:<(.*?)>)?")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_FD_PATH = re.compile(r"-?\w+<([^>]*)>")


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One successful system call: what it was, its path, and the second path of a rename or link."""

    name: str
    path: str
    target: str = ""
    creates: bool = False


def calls(lines: Iterable[str]) -> Iterator[Call]:
    """Yields the calls in the output of ``strace -f -y``, in the order in which they ended."""
    begun: dict[str, str] = {}
    for line in lines:
        match = _LINE.match(line.rstrip("\n"))
        if match is None:
            continue
        thread, text = match.groups()
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>").rstrip()
            continue
        resumed = _RESUMED.match(text)
        if resumed:
            text = begun.pop(thread, f"{resumed[1]}(") + resumed[2]
        found = _CALL.match(text)
        if found and int(found[3]) >= 0:
            yield from _call(found[1], found[2], found[4] or "")


def _call(name: str, arguments: str, result: str) -> Iterator[Call]:
    if name in ("openat", "creat"):
        if result:
            writes = name == "creat" or "O_TRUNC" in arguments
            yield Call(
                "write" if writes else "open", result, creates="O_CREAT" in arguments or name == "creat"
            )
    elif name in ("rename", "renameat", "renameat2", "link", "linkat"):
        source, target = (os.fsdecode(text) for text in _STRING.findall(arguments)[:2])
        yield Call(name[:4].replace("rena", "rename"), source, target)
    elif name in ("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir"):
        kind = "mkdir" if name.startswith("mkdir") else "unlink"
        yield Call(kind, _STRING.findall(arguments)[0])
    elif name in ("sync", "syncfs"):
        yield Call("sync", "/")
    else:
        # copy_file_range and sendfile write to their later, respectively first, descriptor.
        paths = _FD_PATH.findall(arguments)
        at = -1 if name == "copy_file_range" else 0
        if paths:
            yield Call("fsync" if name in ("fsync", "fdatasync") else "write", paths[at])


class Disk:
    """Files and folders under a root, and what of them a power cut could take."""

    def __init__(self, root: str) -> None:
        self.root = root
        # A file's state is shared by its names: [is the data promised].
        self._files: dict[str, list[bool]] = {}
        self._names: dict[str, bool] = {}

    def apply(self, call: Call) -> None:
        """Takes one call into account."""
        path = call.path
        if call.name == "mkdir" and self._inside(path):
            self._names[path] = False
        elif call.name in ("write", "open") and self._inside(path):
            if call.creates and path not in self._files:
                self._files[path] = [call.name != "write"]
                self._names[path] = False
            if call.name == "write":
                self._files.setdefault(path, [False])[0] = False
        elif call.name == "fsync" and _within(path, self.root):
            if path in self._files:
                self._files[path][0] = True
            for name in self._names:
                if posixpath.dirname(name) == path:
                    self._names[name] = True
        elif call.name == "link" and self._inside(call.target):
            self._files[call.target] = self._files[path]
            self._names[call.target] = False
        elif call.name == "rename":
            self._rename(path, call.target)
        elif call.name == "unlink":
            self._files.pop(path, None)
            self._names.pop(path, None)

    def at_risk(self, path: str) -> list[str]:
        """Returns what a power cut could take of a file or folder: data, and names up to the root."""
        found = [name for name in self._files if _within(name, path) and not self._files[name][0]]
        found += [f"name of {name}" for name in self._names if _within(name, path) and not self._names[name]]
        while path != self.root:
            if not self._names.get(path, True):
                found.append(f"name of {path}")
            path = posixpath.dirname(path)
        return sorted({name.replace(self.root + "/", "") for name in found})

    def _rename(self, source: str, target: str) -> None:
        for table in (self._files, self._names):
            for name in [name for name in table if _within(name, source)]:
                table[target + name.removeprefix(source)] = table.pop(name)
        if self._inside(target):
            self._names[target] = False

    def _inside(self, path: str) -> bool:
        return path != self.root and _within(path, self.root)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")
