"""Who trains: generations of ranks, each decided once. Pure rules, and the folder that decides between two.

A generation is an ordered list of members; a member's place is its rank. All members take part in every step
of their generation, so one that misses a single member can complete none: it is over. Its members then report
the step they completed and whom they can reach; the first of them that can proposes the next generation, and
whoever creates the file

    OUTPUT/elastic/SESSION/generation-00000007.json

decides it: a file is linked into place, whole, and only if there is none (link(2) is atomic, on network file
systems too). So two halves of a cut network can never both go on, whatever they believe; and no host
and no message is needed to remember what was decided. A member that finds itself left out is excluded.

Who may propose (`may_propose`) only decides which half of a cut goes on: the larger one at once, of two
equal ones that with the first member; a smaller one if all others are known to be gone, or if nobody else
has decided for a while (`patience_s`). So the run goes on as long as one rank of it lives.

Source: the rules are dynamic linear voting (Jajodia and Mutchler, ACM TODS 15, 1990) for preference, over a
compare-and-swap register for safety.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from foldfeed.trainer.errors import TrainerError
from foldfeed.trainer.groups.topology import by_place

_FILE = re.compile(r"generation-(\d{8,})\.json")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One process of a run.

    Attributes:
      uid: drawn by the process when it comes (back).
      host: where the others reach it.
      port: there.
      identity: host, process and start, as `lease.identity` tells them.
      place: where it stands, see topology.py, with slashes.
    """

    uid: str
    host: str
    port: int
    identity: Mapping[str, Any]
    place: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A generation.

    Attributes:
      generation: its number, from 0.
      step: completed steps that it goes on from: the most that any member has.
      members: in rank order; those that stay keep theirs, new ones come behind those of their node.
    """

    generation: int
    step: int
    members: tuple[Member, ...]

    @property
    def uids(self) -> list[str]:
        """Of the members, in rank order."""
        return [member.uid for member in self.members]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> View:
        """Returns the generation in a dict, as `to_dict` made it.

        Raises:
          KeyError, TypeError, ValueError: it is none.
        """
        members = tuple(Member(**member) for member in found["members"])
        return cls(generation=int(found["generation"]), step=int(found["step"]), members=members)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a member says when it has stopped training in a generation, for good.

    Attributes:
      step: completed steps; -1 when it has no state.
      sees: whom it can reach, new ones included.
    """

    step: int
    sees: frozenset[str]


class FolderRegister:
    """A folder that all ranks see. It decides generations: the first claim of a number wins."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def latest(self) -> View | None:
        """Returns the generation with the highest number; None before the first.

        Raises:
          TrainerError: the folder cannot be read.
        """
        try:
            numbers = [int(found[1]) for name in os.listdir(self._folder) if (found := _FILE.fullmatch(name))]
            if not numbers:
                return None
            path = self._path(max(numbers))
            return View.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise TrainerError(f"the generations in {self._folder} cannot be read: {error!r}") from error

    def claim(self, view: View) -> bool:
        """Makes this generation the one with its number; returns False if there is one.

        Raises:
          TrainerError: the folder cannot be written.
        """
        temporary = self._folder / f".claim-{secrets.token_hex(8)}"
        try:
            temporary.write_text(json.dumps(view.to_dict()) + "\n", encoding="utf-8")
            os.link(temporary, self._path(view.generation))
        except FileExistsError:
            return False
        except OSError as error:
            raise TrainerError(
                f"generation {view.generation} cannot be written to {self._folder}: {error}; an elastic run "
                "needs a folder that all ranks can write, with hard links"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _path(self, generation: int) -> Path:
        return self._folder / f"generation-{generation:08d}.json"


def propose(
    view: View,
    me: str,
    reports: Mapping[str, Report],
    *,
    live: Set[str],
    gone: Set[str],
    joiners: Sequence[Member],
    waited_s: float,
    timeout_s: float,
    patience_s: float,
    max_members: int,
) -> View | None:
    """Returns the next generation if it is this member's turn to claim it.

    Args:
      view: the generation that is over.
      me: uid of this member.
      reports: of this generation, mine among them.
      live: whom this member has a living connection to, itself included.
      gone: whose process is known to have ended, or has left.
      joiners: who wants to join, in the order they came.
      waited_s: since this member reported.
      timeout_s: for which a living member may owe its report.
      patience_s: after which a half that may not propose takes it that the other one is no more.
      max_members: of a generation.
    """
    if waited_s < timeout_s and any(uid in live and uid not in reports for uid in view.uids):
        return None
    group: list[str] = []
    for uid in view.uids:
        reachable = uid in live and uid in reports
        if reachable and all(uid in reports[o].sees and o in reports[uid].sees for o in group):
            group.append(uid)
    if not group or group[0] != me:
        return None
    step = max(reports[uid].step for uid in group)
    patient = waited_s <= patience_s
    if not may_propose(view, group, gone, patient=patient, knows=step >= view.step):
        return None
    room = max(0, max_members - len(group))
    # Who was a member cannot be new: its request came late, or it was left out.
    new = [one for one in joiners if one.uid not in view.uids]
    welcome = [one for one in new if all(one.uid in reports[uid].sees for uid in group)][:room]
    members = [*(member for member in view.members if member.uid in group), *welcome]
    order = by_place([member.place.split("/") for member in members])
    return View(generation=view.generation + 1, step=step, members=tuple(members[rank] for rank in order))


def may_propose(
    view: View, group: Sequence[str], gone: Set[str], *, patient: bool, knows: bool = True
) -> bool:
    """Returns whether these members may go on without the others; see the module docstring.

    Args:
      view: the generation that is over.
      group: those who would go on, in rank order.
      gone: whose process is known to have ended, or has left.
      patient: whether they still expect others to decide.
      knows: whether one of them has the state that the generation began with. New ones that have not got it
        yet leave those behind who have it only if they must: the run would go back to a snapshot.
    """
    twice, all_of_them = 2 * len(group), len(view.members)
    if knows and (twice > all_of_them or (twice == all_of_them and view.members[0].uid in group)):
        return True
    return not patient or all(uid in group or uid in gone for uid in view.uids)
