"""Reads a Dockerfile strictly: what is not understood is an error. For tests and for the run in a chroot."""

import dataclasses
import json
import re
import shlex

# The instructions that ours need. Others are a reason to look again.
KNOWN = ("FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "ENTRYPOINT")
_FROM = re.compile(r"(\S+) AS ([a-z][a-z0-9-]*)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
      line: its first line, 1-based.
      name: in capitals.
      text: the rest, continued lines joined.
    """

    line: int
    name: str
    text: str

    def copy(self) -> tuple[str | None, list[str], str]:
        """Returns stage, sources and destination of a COPY."""
        words = shlex.split(self.text)
        stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
        assert not any(word.startswith("--") for word in words), f"line {self.line}: {self.text}"
        return stage, words[:-1], words[-1]

    def pairs(self) -> dict[str, str]:
        """Returns the variables of an ENV."""
        return dict(word.split("=", 1) for word in shlex.split(self.text))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One FROM and what follows.

    Attributes:
      name: behind AS.
      base: an image, or the name of a stage before.
      instructions: the others, in order.
    """

    name: str
    base: str
    instructions: tuple[Instruction, ...]

    def of(self, name: str) -> list[Instruction]:
        """Returns the instructions of one kind."""
        return [one for one in self.instructions if one.name == name]


def parse(text: str) -> dict[str, Stage]:
    """Returns the stages by name, in order; raises AssertionError with the line of what is not understood."""
    found: dict[str, tuple[str, list[Instruction]]] = {}
    for line, words in _joined(text):
        name, _, rest = words.partition(" ")
        assert name in KNOWN, f"line {line}: {name!r} is none of {KNOWN}"
        if name == "FROM":
            match = _FROM.fullmatch(rest)
            assert match, f"line {line}: FROM IMAGE AS NAME, not {rest!r}"
            assert match.group(2) not in found, f"line {line}: stage {match.group(2)} is there twice"
            found[match.group(2)] = (match.group(1), [])
        else:
            assert found, f"line {line}: {name} before FROM"
            found[list(found)[-1]][1].append(Instruction(line=line, name=name, text=rest.strip()))
    return {
        name: Stage(name=name, base=base, instructions=tuple(instructions))
        for name, (base, instructions) in found.items()
    }


def exec_form(text: str) -> list[str]:
    """Returns the words of an ENTRYPOINT, which must be a JSON list: a shell would swallow signals."""
    words = json.loads(text)
    assert isinstance(words, list)
    assert all(isinstance(word, str) for word in words)
    return words


def _joined(text: str) -> list[tuple[int, str]]:
    lines, start, held = [], 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not held):
            continue
        start = start if held else number
        held += line.strip() if not held else f" {line.strip()}"
        if held.endswith("\\"):
            held = held[:-1].rstrip()
            continue
        lines.append((start, held))
        held = ""
    assert not held, f"line {start}: the last line goes on"
    return lines
