"""`StepWork`: what one rank does for its steps, from numbers of samples to a step whose features are made.

Lives from a loader's start to its stop. Knows which alignments a step takes, asks a supply for them some
steps ahead, hands them to the maker of features, one by one in tasks of their own or, where supply and maker
can, all that lie together at once while the step is assembled, and remembers which samples are made from
another record than their own (`foldfeed.loader.unreadable`) until the consumer has them. Owns no thread:
`foldfeed.loader.prefetch` runs what it gives.

Invariant: all alignments of a sample in a step are of the same record.

`StepWork.tasks` is for one thread, in the order of the steps; all else is thread safe.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from foldfeed.loader.features.device import FeatureMaker, Layout, ReadyStep
from foldfeed.loader.features.draws import draw_numbers
from foldfeed.loader.meters.meters import ASSEMBLE, FETCH, PREPARE, Meters
from foldfeed.loader.reading.pieces import Piece
from foldfeed.loader.reading.plan import draw_num_recycles
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.reading.supply import PackedSupply, SampleSupply
from foldfeed.loader.unreadable import SUBSTITUTE, Substitution

READ_AHEAD_SAMPLES = 256
_log = logging.getLogger(__name__)


class StepWork:
    """The work of one rank, from a first step on."""

    def __init__(
        self,
        reader: SampleReader,
        supply: SampleSupply,
        maker: FeatureMaker,
        layout: Callable[[int], Layout],
        meters: Meters,
        count: Callable[..., None],
        first_step: int,
    ) -> None:
        """Asks for nothing yet.

        Args:
          reader: what the supply reads with, past its caches.
          supply: where samples come from.
          maker: of their features.
          layout: returns this rank's part of a step.
          meters: that count what is done here.
          count: takes ``bytes``, ``fetch_s`` and ``prepare_s`` of each alignment; on any thread.
          first_step: whose tasks are asked for first; then come all others in order.
        """
        self._reader = reader
        self._recipe = reader.recipe
        self._supply = supply
        # Where samples are taken as they lie together, and the steps that were asked for and not assembled.
        self._packed = supply if maker.takes_packed and isinstance(supply, PackedSupply) else None
        self._steps: dict[int, tuple[Layout, list[int]]] = {}
        self._maker = maker
        self._layout = layout
        self._meters = meters
        self._count = count
        self._asked_step = first_step
        self._substitutions: dict[int, Substitution] = {}
        self._lock = threading.Lock()

    def tasks(self, step: int) -> list[Callable[[], list[Any]]]:
        """Returns functions that each prepare some alignments of a step, in its order."""
        self._ask(step)
        _, numbers = self._steps[step]
        if self._packed is not None:
            return []
        size = self._num_together(step)
        return [
            functools.partial(self._prepared, step, first, numbers[first : first + size], len(numbers))
            for first in range(0, len(numbers), size)
        ]

    def costs(self, step: int) -> list[int]:
        """Returns what each task of a step is expected to cost, see `SampleReader.costs`."""
        samples = [number // self._recipe.num_draws for number in self._steps[step][1]]
        return self._reader.costs(samples[:: self._num_together(step)])

    def assembled(self, step: int, parts: list[list[Any]]) -> ReadyStep:
        """Returns a step from what its tasks gave."""
        layout, numbers = self._steps.pop(step)
        if self._packed is not None:
            self._put(step, numbers, self._packed)
        with self._meters.stage(ASSEMBLE).doing(ASSEMBLE, step=step):
            prepared = [one for part in parts for one in part]
            return self._maker.assemble(step, layout, prepared)

    def taken(self, samples: Sequence[int]) -> tuple[Substitution, ...]:
        """Returns, once, those of some samples that are made from another record."""
        with self._lock:
            return tuple(
                self._substitutions.pop(sample) for sample in samples if sample in self._substitutions
            )

    def _num_together(self, step: int) -> int:
        """Returns how many alignments a task prepares: all of a sample where its record may be replaced."""
        if self._reader.on_unreadable != SUBSTITUTE:
            return 1
        return len(
            draw_numbers(self._recipe, 0, draw_num_recycles(self._recipe, self._reader.order.seed, step))
        )

    def _ask(self, step: int) -> None:
        """Lets processes read some `READ_AHEAD_SAMPLES` behind a step, as far as their memory goes."""
        num_samples = max(1, sum(len(samples) for _, samples in self._layout(step)))
        stop = step + -(-READ_AHEAD_SAMPLES // num_samples)
        for later in range(max(step, self._asked_step), stop):
            layout = self._layout(later)
            recycles = draw_num_recycles(self._recipe, self._reader.order.seed, later)
            numbers = [
                number
                for _, samples in layout
                for sample in samples
                for number in draw_numbers(self._recipe, sample, recycles)
            ]
            self._steps[later] = layout, numbers
            self._supply.ask(numbers, self._num_together(later))
        self._asked_step = max(stop, self._asked_step)

    def _put(self, step: int, numbers: list[int], supply: PackedSupply) -> None:
        """Hands all alignments of a step to the maker of features as they lie together."""
        index = dict(zip(numbers, range(len(numbers)), strict=True))
        stage = self._meters.stage(PREPARE)
        replaced: dict[int, Substitution] = {}
        first = 0
        while first < len(numbers):
            group, pieces = supply.take(numbers[first])
            for piece in pieces:
                indices = [index[number] for number in piece.numbers]
                with stage.doing(PREPARE, sample=piece.numbers[0] // self._recipe.num_draws) as doing:
                    self._maker.put(step, indices, len(numbers), piece)
                self._count_piece(piece, doing.seconds)
                if piece.substitution is not None:
                    replaced[piece.numbers[0]] = piece.substitution
                piece.give_back(len(indices))
            first += len(group)
        if replaced:
            size = self._num_together(step)
            for first in range(0, len(numbers), size):
                found = [replaced.get(number) for number in numbers[first : first + size]]
                self._settle(step, first, numbers[first : first + size], len(numbers), found)

    def _count_piece(self, piece: Piece, seconds: float) -> None:
        num_samples = len(piece.numbers)
        self._count(bytes=piece.num_bytes, fetch_s=sum(piece.read_s), prepare_s=seconds)
        self._meters.took("sample_prepare", seconds / num_samples, num_samples)

    def _prepared(self, step: int, first: int, numbers: list[int], num_numbers: int) -> list[Any]:
        """Prepares some alignments; if there are several they are all that a step has of one sample.

        Args:
          step: whose they are.
          first: place of the first among those of the step.
          numbers: of the alignments.
          num_numbers: of the whole step.
        """
        prepared, found = [], []
        places = [(step, first + place, num_numbers) for place in range(len(numbers))]
        for number, place in zip(numbers, places, strict=True):
            one, substitution = self._prepared_one(number, place)
            prepared.append(one)
            found.append(substitution)
        return self._settle(step, first, numbers, num_numbers, found) or prepared

    def _settle(
        self,
        step: int,
        first: int,
        numbers: Sequence[int],
        num_numbers: int,
        found: Sequence[Substitution | None],
    ) -> list[Any] | None:
        """Sees to it that alignments that were prepared are all of one record, and tells of a substitute.

        Args:
          step: as for `_prepared`, like the next three.
          first: likewise.
          numbers: likewise.
          num_numbers: likewise.
          found: their substitutions.
        Returns: the alignments, where they had to be prepared again.
        """
        replaced = next(filter(None, found), None)
        if replaced is None:
            return None
        again = None
        attempts = {0 if one is None else one.attempt for one in found}
        if len(attempts) > 1:
            # Damage met some alignments and not others.
            with self._meters.stage(PREPARE).doing(FETCH, sample=replaced.sample):
                reads = self._reader.read_together(numbers, max(attempts), replaced.reason)
            again = [
                self._maker.prepare(step, place, num_numbers, read.arrays)
                for place, read in enumerate(reads, first)
            ]
            assert reads[0].substitution is not None
            replaced = reads[0].substitution
        self._tell(replaced)
        return again

    def _prepared_one(self, number: int, place: tuple[int, int, int]) -> tuple[Any, Substitution | None]:
        read = self._supply.get(number)
        num_bytes = read.arrays.num_bytes
        stage = self._meters.stage(PREPARE)
        try:
            with stage.doing(PREPARE, sample=number // self._recipe.num_draws) as doing:
                prepared = self._maker.prepare(*place, read.arrays)
        finally:
            read.release()
        self._count(bytes=num_bytes, fetch_s=read.read_s, prepare_s=doing.seconds)
        self._meters.took("sample_prepare", doing.seconds)
        return prepared, read.substitution

    def _tell(self, replaced: Substitution) -> None:
        with self._lock:
            self._substitutions[replaced.sample] = replaced
        _log.warning(
            "sample %d is made from record %r, because %r cannot be read: %s",
            *(replaced.sample, replaced.substitute_id, replaced.record_id, replaced.reason),
        )
