"""The coordinator actor: one place where workers fetch work and the driver waits for results.

Consumes units and learner commands from the driver, results from the workers. Produces work for
whoever asks. Everyone waits here, no one waits for it: workers are unblocked by submit and by
each other's results, the driver by results or by `fail`. It holds no model and does no
arithmetic; the queues are in dispatcher.py.

When the learners are lost, the driver rewinds: units, commands and answers are forgotten, and the
next group of learners is another attempt, to which nothing of the earlier one gets through.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from rlgen.actors.dispatcher import Dispatcher
from rlgen.actors.heartbeat import Pulse
from rlgen.errors import RoleLost, StorageError
from rlgen.learner.checkpoint import Part
from rlgen.types import GroupCounts, LearnerBatch, Rollout, ScoredRollout, WorkUnit

LEARNER = "learner-"
"""How the names of learner ranks begin."""
LIFE = "#"
"""Between the place of a worker and the number of the replacement."""
_POLL_S = 5.0
"""Longest wait of one call; the caller asks again, so that a lost caller leaves no trace."""


def place_of(worker: str) -> str:
    """The place that a worker holds: of `rollout-1#3`, the third to hold it, `rollout-1`."""
    return worker.partition(LIFE)[0]


class Stop:
    """The answer to a worker that may go home."""


@dataclass(frozen=True)
class LearnerCommand:
    """One thing for the learner ranks to do; they all see all commands in order."""

    kind: Literal["learn", "save", "digest", "stop"]
    batches: tuple[LearnerBatch, ...] = field(default=(), repr=False)
    """Per rank, for "learn"."""
    uri: str = ""
    """Where to, for "save"."""

    def for_rank(self, rank: int) -> "LearnerCommand":
        """The same command with this rank's batch alone."""
        return LearnerCommand(self.kind, self.batches[rank : rank + 1], self.uri)


class Coordinator:
    """Work queues and the learners' mailbox, as an asyncio actor."""

    def __init__(self, attempt: int = 0) -> None:
        """Serve this attempt of the learners; a coordinator that replaces another begins late."""
        self._dispatcher = Dispatcher()
        self._changed = asyncio.Condition()
        self._error: BaseException | None = None
        self._is_closed = False
        self._crew: set[str] = set()
        self._vacant_since: dict[str, float] = {}
        self._recovery_s: dict[str, float] = {}
        self._lost: set[str] = set()
        self._commands: list[LearnerCommand] = []
        self._answers: dict[tuple[int, int], Any] = {}
        self._saves: dict[str, list[Part] | StorageError] = {}
        self._attempt = attempt
        self._last_beats: dict[Pulse, float] = {}

    async def submit(self, units: Sequence[WorkUnit]) -> None:
        """Queue units."""
        self._dispatcher.submit(units)
        await self._notify()

    async def next_unit(self, worker: str, done: Rollout | None) -> WorkUnit | Stop | None:
        """Take a finished rollout, if any, and give the next unit; None means ask again."""
        if done is not None:
            self._dispatcher.finish_sampling(worker, done)
            await self._notify()
        return await self._lease(worker, self._dispatcher.lease_sampling)

    async def next_rollout(self, worker: str, done: ScoredRollout | None) -> Rollout | Stop | None:
        """Take a finished score, if any, and give the next rollout; None means ask again."""
        if done is not None:
            self._dispatcher.finish_scoring(worker, done)
            await self._notify()
        return await self._lease(worker, self._dispatcher.lease_scoring)

    async def await_crew(self, wanted: dict[str, int], timeout_s: float) -> dict[str, int]:
        """Wait until so many workers of each role have asked for work; who is missing then."""

        def missing() -> dict[str, int]:
            here = self._present()
            return {role: n - here[role] for role, n in wanted.items() if n > here[role]}

        with suppress(TimeoutError):
            await asyncio.wait_for(self._wait(lambda: not missing()), timeout_s)
        return missing()

    async def collect(self, unit_ids: Sequence[str]) -> list[ScoredRollout]:
        """Wait until all these units are scored, and hand them out."""
        await self._wait(lambda: self._dispatcher.are_scored(unit_ids))
        return self._dispatcher.take(unit_ids)

    async def release(self, worker: str, *, is_missed: bool = True) -> None:
        """Put a lost worker's unit back; its last call may still wait here and gets no other.

        Args:
            worker: who was lost.
            is_missed: whether the time until someone takes its place counts as a recovery.
        """
        self._lost.add(worker)
        self._crew.discard(worker)
        if is_missed:
            self._vacant_since[place_of(worker)] = time.monotonic()
        self._forget(worker)
        self._dispatcher.release(worker)
        await self._notify()

    async def send(self, command: LearnerCommand) -> int:
        """Append a command for the learners; returns its number."""
        if command.kind == "save":
            self._saves.clear()
        self._commands.append(command)
        await self._notify()
        return len(self._commands) - 1

    async def next_command(self, attempt: int, rank: int, number: int) -> LearnerCommand | None:
        """Give a rank the command of this number; None means ask again."""
        await self._poll(lambda: attempt != self._attempt or number < len(self._commands))
        if attempt != self._attempt:
            return LearnerCommand("stop")
        if number >= len(self._commands):
            return None
        return self._commands[number].for_rank(rank)

    async def answer(self, attempt: int, rank: int, number: int, value: Any) -> None:
        """Take a rank's answer to a command."""
        if attempt == self._attempt:
            self._answers[number, rank] = value
            await self._notify()

    async def note_saved(self, attempt: int, uri: str, outcome: list[Part] | StorageError) -> None:
        """Take what became of the learner's parts of a checkpoint."""
        if attempt == self._attempt:
            self._saves[uri] = outcome

    async def learner_saved(self, uri: str) -> list[Part] | None:
        """The learner's parts of a checkpoint; None while they are being written."""
        outcome = self._saves.get(uri)
        if isinstance(outcome, StorageError):
            raise outcome
        if outcome is None and self._error is not None:
            raise self._error
        return outcome

    async def lose_learners(self, attempt: int, reason: str) -> None:
        """Tell the driver that this attempt of the learners is over before its end."""
        if attempt == self._attempt and not self._is_closed:
            await self.fail(RoleLost(f"the learners were lost ({reason})."))

    async def rewind(self, attempt: int) -> None:
        """Forget units, commands and answers, and that a role was lost; other errors stay."""
        self._attempt = attempt
        self._dispatcher.rewind()
        self._forget(LEARNER)
        self._commands.clear()
        self._answers.clear()
        if isinstance(self._error, RoleLost):
            self._error = None
        await self._notify()

    async def beat(self, pulse: Pulse) -> None:
        """Note a sign of life."""
        self._last_beats[pulse] = time.monotonic()

    async def take_silent(self, timeout_s: float) -> list[Pulse]:
        """Who was heard of before and not within the last seconds; each is named once."""
        limit = time.monotonic() - timeout_s
        silent = [pulse for pulse, last in self._last_beats.items() if last < limit]
        for pulse in silent:
            del self._last_beats[pulse]
        return silent

    async def pulses(self, prefix: str) -> list[Pulse]:
        """Workers of this kind that give signs of life."""
        return [pulse for pulse in self._last_beats if pulse.worker.startswith(prefix)]

    async def wait_answer(self, number: int, world_size: int) -> Any:
        """Wait until every rank has answered; rank 0's answer."""
        await self._wait(lambda: all((number, rank) in self._answers for rank in range(world_size)))
        value = self._answers[number, 0]
        for rank in range(world_size):
            del self._answers[number, rank]
        self._commands[number] = LearnerCommand(self._commands[number].kind)  # frees the batch
        return value

    async def fail(self, error: BaseException) -> None:
        """Make everyone who waits here raise this error; the first one counts."""
        self._error = self._error or error
        await self._notify()

    async def close(self) -> None:
        """Send workers and learners home."""
        self._is_closed = True
        await self.send(LearnerCommand("stop"))

    async def describe(self) -> str:
        """Where the work is, for messages."""
        return self._dispatcher.describe()

    async def report(self) -> tuple[GroupCounts, dict[str, float], dict[str, int]]:
        """The ledger of training groups, how long it took to fill a lost worker's place, and how
        many workers of each role there are."""
        return self._dispatcher.counts(), dict(self._recovery_s), self._present()

    def _present(self) -> Counter[str]:
        return Counter(worker.partition("-")[0] for worker in self._crew)

    def _forget(self, prefix: str) -> None:
        self._last_beats = {
            pulse: last
            for pulse, last in self._last_beats.items()
            if not pulse.worker.startswith(prefix)
        }

    async def _lease(self, worker: str, lease: Callable[[str], Any]) -> Any:
        found: list[Any] = []
        if worker not in self._crew and worker not in self._lost:
            self._crew.add(worker)
            since = self._vacant_since.pop(place_of(worker), None)
            if since is not None:
                self._recovery_s[worker.partition("-")[0]] = time.monotonic() - since
            await self._notify()

        def try_lease() -> bool:
            if self._is_closed or worker in self._lost:
                found.append(Stop())
            elif (work := lease(worker)) is not None:
                found.append(work)
            return bool(found)

        await self._poll(try_lease)
        return found[0] if found else None

    async def _poll(self, is_done: Callable[[], bool]) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(is_done), _POLL_S)
            except TimeoutError:
                return

    async def _wait(self, is_done: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._error is not None or is_done())
        if self._error is not None:
            raise self._error

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
