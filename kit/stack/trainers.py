"""`TrainerGroup`: the ranks of a stack, and calls that all of them answer together.

Ranks wait for each other in every layer. Where one of them fails (its share of the samples did not
fit into its device's memory, say), the others would wait for it in the next layer for ever. So the
ranks that have answered leave the process group, on which the others fail too; then all of them
join a new one, with the weights and the optimizer that each of them still has:

    rank 0    update ── waits for rank 1 ─────────────── fails ─┐
    rank 1    update ── fails ── leaves the group ──────────────┴── regroup: as before the update
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from kit.cluster.placement import Placement
from kit.cluster.processes import TRAINER
from kit.errors import KitError, StackError, StoppedError
from kit.memory.plan import PhaseName
from kit.messages import FIRST, TrainBatch
from kit.stack.actors import (
    CONTROL,
    StackSettings,
    forget_actor,
    make_trainers,
    own_settings,
    trainer_name,
    trainer_settings,
)
from kit.stack.calls import Calls, HeadDiedError, LateError, TrainerDiedError, trainer_died
from kit.utils.interrupts import held

GRACE = 5.0
"""Seconds that the other ranks have to answer too, where all of them met with the same error."""
PATIENCE = 60.0
"""Seconds that the other ranks have to notice that one has left."""


class TrainerGroup:
    """The actors of all ranks: made, watched, called, and started again for a checkpoint."""

    def __init__(self, settings: StackSettings, placement: Placement, calls: Calls) -> None:
        """Make nothing yet; see `create`."""
        self.actors: list[Any] = []
        self.version = 0
        """Which weights they have: a number that is given to no others."""
        self.newest_version = 0
        """The last number that was given: after an undo `version` is a smaller one."""
        self.process_groups = 1
        """How many process groups the ranks have joined."""
        self.needs_load = False
        """Whether they were started again, and have read no checkpoint yet."""
        self.turn: str | None = FIRST
        """Of which session they hold the weights; the numbers here are of the one that calls."""
        self._settings, self._placement, self._calls = settings, placement, calls
        self._unsettled: list[Any] = []
        """Calls of an update whose answer nobody has taken."""
        self._measured: dict[str, int] = {}
        self._looks: list[tuple[PhaseName, Any]] = []

    def create(self) -> None:
        """Make all actors, not started yet."""
        self.actors[:] = make_trainers(self._settings, self._placement)

    def find(self) -> None:
        """Look the actors up by name, in a stack that lives. Raises StackError if one is gone."""
        import ray

        ranks = range(self._settings.config.training.num_trainers)
        try:
            self.actors[:] = [ray.get_actor(trainer_name(rank)) for rank in ranks]
        except ValueError as error:
            raise _gone(error) from None
        if not all(map(self._calls.is_ready, self.actors)):
            raise _gone("The last kernel ended while it was started again.")
        self.watch()
        if TRAINER in self._calls.watch.dead():
            raise _gone("A process of it has ended.")

    def restart(self) -> None:
        """Start all ranks anew, with the weights of the model's files: they have to be loaded."""
        self.needs_load, self.turn = True, FIRST
        self._looks.clear()  # nobody answers them any more
        with held():
            for rank, actor in enumerate(self.actors):
                forget_actor(actor, trainer_name(rank))
            self.create()
        calls = [actor.start.remote() for actor in self.actors]
        calls += [actor.place.remote() for actor in self.actors]
        self._calls.get(calls, "start", self._settings.config.engine.start_timeout)
        self.watch()

    def reset(self) -> dict[str, Any]:
        """Have running ranks begin as after a start; what the first one says of itself."""
        calls = [
            actor.reset.remote(trainer_settings(self._settings, self._placement, rank))
            for rank, actor in enumerate(self.actors)
        ]
        infos: list[dict[str, Any]] = self._calls.get(calls, "reset")
        self.version = self.newest_version = 0
        self.turn = FIRST
        return infos[0]

    def watch(self) -> None:
        """Register the processes of all ranks, which have started, with the watchdog."""
        calls = [actor.processes.remote() for actor in self.actors]
        pids = self._calls.get(calls, "start", self._settings.config.engine.start_timeout)
        ranks = zip(self.actors, self._settings.layout.trainers, pids, strict=True)
        members = (self._placement.members(*rank) for rank in ranks)
        self._calls.watch.add(TRAINER, [member for of_rank in members for member in of_rank])

    # ---- several sessions ----------------------------------------------------------------------

    def take_turn(self, name: str) -> None:
        """Have the ranks hold a session's weights, which are those of before if it is a new one.

        They have to be awake.
        """
        if self.turn != name:
            with held():
                self.ask("take_turn", own_settings(self._settings, name))
                self.turn = name

    def drop(self, name: str) -> None:
        """Have the ranks forget a session."""
        with held():
            self.ask("drop", name)
            self.turn = None if self.turn == name else self.turn

    # ---- calls ---------------------------------------------------------------------------------

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank in which no rank waits for another; answers in rank order."""
        return self._calls.ask(self.actors, method, *arguments)

    def call_all_ranks(
        self, method: str, *arguments: Any, doing: str = "", mutates: bool = False
    ) -> list[Any]:
        """Call a method in which the ranks wait for each other; answers in rank order.

        Args:
            method: of the trainer's actor.
            arguments: the same for all ranks.
            doing: what messages call it; the method's name if it is empty.
            mutates: whether it changes weights, so that ranks would diverge if only some did it.

        Raises:
            StackError: what a rank raised. The ranks can be used again, with the state they had.
            TrainerDiedError: they cannot; only a checkpoint helps.
        """
        self._calls.refuse_without_head(doing or method)
        calls = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        return self._collect(calls, doing or method, mutates=mutates)

    def update(
        self, batch: TrainBatch, update_id: str, folder: Path
    ) -> tuple[list[dict[str, float]], bool]:
        """Make optimizer steps in every rank: (metrics of each step, whether it was done now).

        Args:
            batch: what to train on.
            update_id: an update of this id is made once.
            folder: for a file by which an interrupt stops all ranks between two steps.

        Raises:
            KeyboardInterrupt: after an interrupt; the update was made, or nothing has changed.
        """
        import ray

        # Large arguments pass through the raylet, and using it after its end ends this process.
        self._calls.refuse_without_head("update")
        shared = ray.put(batch)
        stop = folder / f"stop-{secrets.token_hex(8)}"
        with held(stop.touch):
            sent = (shared, update_id, str(stop))
            self._unsettled = [actor.update.remote(*sent) for actor in self.actors]
            try:
                metrics, applied = self._settle()
            except StoppedError as stopped:
                raise KeyboardInterrupt(str(stopped)) from None
            self.measure("update")
        return metrics, applied

    def settle(self) -> bool:
        """Wait for an update from which a third interrupt or a time limit had turned away.

        So nobody works with weights whose number is not known. Returns whether it was made now.
        """
        try:
            return bool(self._unsettled) and self._settle()[1]
        except StoppedError:
            return False

    def _settle(self) -> tuple[list[dict[str, float]], bool]:
        try:
            metrics, applied = self._collect(self._unsettled, "update", mutates=True)[0]
        except (LateError, KeyboardInterrupt):
            raise
        except BaseException:
            self._unsettled = []
            raise
        self._unsettled = []
        if applied:
            self.newest_version += 1
            self.version = self.newest_version
        return metrics, applied

    def measure(self, phase: PhaseName) -> None:
        """Ask every rank for the peak of its device's memory; `measured` collects the answers."""
        if self._settings.device == "cuda":
            self._looks += [(phase, actor.device_memory.remote()) for actor in self.actors]
            if len(self._looks) > 100:
                _ = self.measured

    @property
    def measured(self) -> dict[str, int]:
        """Most bytes that were seen on a rank's device, by phase of the plan; empty on a CPU."""
        looks, self._looks = self._looks, []
        answers = self._calls.get([look for _, look in looks], "look")
        for (phase, _), answer in zip(looks, answers, strict=True):
            self._measured[phase] = max(self._measured.get(phase, 0), answer["peak"])
        return dict(self._measured)

    # ---- when one rank fails -------------------------------------------------------------------

    def _collect(self, calls: list[Any], doing: str, *, mutates: bool) -> list[Any]:
        try:
            answers: list[Any] = self._calls.get(calls, doing)
            return answers
        except (LateError, TrainerDiedError, HeadDiedError, KeyboardInterrupt):
            raise
        except KitError as error:
            if len(calls) < 2:
                raise
            raise self._regroup(calls, doing, error, mutates) from error

    def _regroup(self, calls: list[Any], doing: str, error: KitError, mutates: bool) -> KitError:
        """Make the ranks usable again after an error of one of them; the error to raise."""
        count = len(calls)
        ended = self._calls.wait(calls, count, doing, GRACE)
        errors = {
            rank: self._error(call, doing) for rank, call in enumerate(calls) if call in ended
        }
        for of_rank in errors.values():
            if isinstance(of_rank, TrainerDiedError):  # the others' errors are consequences of it
                return of_rank
        if len(ended) == count:
            failed = [rank for rank, of_rank in errors.items() if of_rank]
            if len(failed) == count or not mutates:  # mostly they had agreed on it
                return error
            return self._give_up(
                f"{doing} failed in rank {failed[0]} only, at its very end.", error
            )
        waiting = [rank for rank, call in enumerate(calls) if call not in ended]
        for actor in self.actors:  # also those that wait: NCCL does not notice by itself
            actor.leave_group.options(concurrency_group=CONTROL).remote()
        if len(self._calls.wait(calls, count, doing, PATIENCE)) < count:
            return self._give_up(f"Rank {waiting[0]} still waits for another that failed.", error)
        if mutates and any(not self._error(calls[rank], doing) for rank in waiting):
            return self._give_up(f"{doing} failed in rank {min(errors)} only.", error)
        rendezvous = self._placement.rendezvous(secrets.token_hex(4))
        again = [actor.regroup.remote(rendezvous) for actor in self.actors]
        try:
            self._calls.get(again, "regroup", self._settings.config.engine.start_timeout)
        except KitError as why:
            return self._give_up(f"The ranks did not meet again after an error: {why.what}", error)
        self.process_groups += 1
        return error

    def _error(self, call: Any, doing: str) -> KitError | None:
        try:
            self._calls.get(call, doing)
        except KitError as error:
            return error
        return None

    def _give_up(self, what: str, error: KitError) -> StackError:
        """End all ranks: they would train on with different weights, or wait for ever."""
        self._calls.watch.end(TRAINER)
        died = trainer_died(f"The trainers had to be ended. {what}")
        return TrainerDiedError(died.what, why=f"{error.what} {died.why}", fix=died.fix)


def _gone(why: object) -> StackError:
    return StackError(
        "The stack lives, but its trainer does not, and what it had learned is gone.",
        why=str(why),
        fix="end it with `kit doctor --stop`, and load the last checkpoint: "
        "`RLSession.load(path)`.",
    )
