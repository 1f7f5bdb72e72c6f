"""`SessionParts`: the parts of a session; how it starts and ends.

start ── a stack of its own, or one that was left warm, reset ───────┐
attach ── the stack of a kernel that is gone, as it was ─────────────┤
                                                                     ▼
                                                                  running
close ── every process ends; or it is left warm ◄────────────────────┤
the kernel restarts or is killed: the stack waits for `attach` ◄─────┘

Everything is checked before a process runs, and nothing is left behind.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from kit import tracking
from kit.checkpoint.inputs import Inputs
from kit.checkpoint.snapshots import SnapshotStore
from kit.checkpoint.state import TrainState
from kit.config import SessionConfig
from kit.data.stream import PromptStream
from kit.diagnostics.agreement import check_agreement, tokens_used
from kit.errors import SessionError, StackError
from kit.lifecycle import journal, resume, running
from kit.lifecycle.checks import (
    check_experts,
    check_functions,
    check_optimizer,
    check_peft,
    warn_of_dropout,
)
from kit.lifecycle.journal import Journal
from kit.lifecycle.lock import SessionLock
from kit.lifecycle.step import Tracker
from kit.reports import SessionState
from kit.reports.runs import RunSettings
from kit.rewards import build
from kit.rewards.timeouts import LIMIT
from kit.rollout.batch import Advantage
from kit.rollout.collector import RolloutCollector
from kit.rollout.drafts import find_draft
from kit.rollout.sampler import PromptSampler
from kit.tracking.recorder import current_group, current_run
from kit.utils.files import working_folder
from kit.utils.forks import at_exit
from kit.utils.interrupts import held
from kit.utils.shadowing import check_hidden_packages

if TYPE_CHECKING:
    from kit.rewards.signature import Reward
    from kit.stack.slots import Slot
    from kit.stack.stack import Stack
    from kit.tracking.recorder import Recorder


CLOSE_SECONDS = 1.0
"""How long closing waits for a training step to end by itself."""
WARM_SECONDS = 600.0
"""How long a stack is left warm where no setting says it."""


class SessionParts:
    """Parts of one session. They do not know the session.

    Some are there from `prepare` on (`sampler`, `reward`, `collector`, `state.stream`), the journal
    once the session runs.
    """

    sampler: PromptSampler
    reward: Reward
    """What `score` takes where it is given none."""
    advantage: Advantage | None = None
    """What makes advantages in place of the configured estimator."""
    collector: RolloutCollector
    journal: Journal

    def __init__(self, config: SessionConfig, state: TrainState | None = None) -> None:
        self.state = state or TrainState(config)
        self.snapshots = SnapshotStore(self.state, self.use)
        self.lock = SessionLock(self._give_way)
        self.tracker = Tracker()
        self.phase = "not started"
        """`not started`, `running` or `closed`."""
        self.start_seconds = 0.0
        self.root = self
        """The session for which the stack was started; its own parts, unless this is a fork."""
        self.forks: dict[str, SessionParts] = {}
        """Forks on the same stack by their names; one mapping for all of them."""
        self.fork_name = ""
        """Of this one among them; empty for the first session."""
        self.slot: Slot | None = None
        """Its share of the stack, as long as it runs."""
        self._stack: Stack | None = None
        self._process = os.getpid()
        """The one that drives the stack; a child that it forks has these parts too."""
        self._at_exit: Callable[[], None] = self._end_of_process
        self._last_versions = 0, 0
        """Weight versions of engine and trainer when the session was closed."""

    @property
    def stack(self) -> Stack:
        """Engine and trainers; an update that nobody waited for is counted first.

        Raises:
            SessionError: the session is not running, or this is a fork of its process.
        """
        self.refuse_in_fork()
        if self._stack is None:
            raise self._not_running()
        if self.slot:
            self.state.step += self._stack.slots.settle(self.slot)
        return self._stack

    def _not_running(self) -> SessionError:
        again = "" if self.phase == "not started" else ", or `RLSession.load(path)`"
        if self.root is self or self.phase != "closed":
            fix = f"make a running one with `session = RLSession.start(...)`{again}."
            return SessionError(f"The session is {self.phase}.", fix=fix)
        root = self.root.state.config.name
        ended = self.root.phase != "running"
        return SessionError(
            f"The fork {self.state.config.name!r} is closed.",
            why=f"The session {root!r} ended, whose stack it shared." if ended else "",
            fix="continue what it has saved as a session of its own: RLSession.load(path)"
            + ("." if ended else f"; or fork {root!r} again: session.fork(...)."),
        )

    @contextmanager
    def _give_way(self) -> Iterator[None]:
        if self._stack is None:
            yield
            return
        with self._stack.give_way() as around:
            yield
        self._limit_rewards(around)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the stack to itself in the block, when sessions that share it have finished.

        Raises:
            StackError: it is writing responses for another session in this very thread.
        """
        if self._stack is None or self.slot is None:
            yield
            return
        with self._stack.turn(self.slot) as around:
            self._limit_rewards(self.slot)
            try:
                yield
            finally:
                self._limit_rewards(around)

    def _limit_rewards(self, slot: Slot | None) -> None:
        """Give reward functions the time that the session of a slot allows them."""
        for each in (self.root, *self.forks.values()):
            if slot and each.slot is slot:
                LIMIT.seconds = each.state.config.reward.timeout

    def running(self) -> Self:
        """Return these parts. Raises SessionError if the session is not running."""
        _ = self.stack
        return self

    @property
    def is_inherited(self) -> bool:
        """Whether the session runs, and another process drives it, which has forked this one."""
        return self._stack is not None and self._process != os.getpid()

    def refuse_in_fork(self) -> None:
        """Raise SessionError in a child that the session's process has forked."""
        if self.is_inherited:
            raise SessionError(
                f"The session {self.state.config.name!r} belongs to process {self._process}; this "
                f"is process {os.getpid()}, which was forked from it.",
                why="A forked child has none of the threads that talk to the stack, and a session "
                "has one driver.",
                fix="call the session's verbs in its own process, and hand the child plain values; "
                "a session of its own needs a fresh process: "
                'multiprocessing.get_context("spawn"), or subprocess.',
            )

    @property
    def engine_version(self) -> int:
        """The weights that the engine generates with."""
        return self._versions()[0]

    @property
    def weight_version(self) -> int:
        """The weights that the trainer holds."""
        return self._versions()[1]

    def _versions(self) -> tuple[int, int]:
        if self._stack is None or self.slot is None:
            return self._last_versions
        return self._stack.slots.versions(self.slot)

    # ---- start ---------------------------------------------------------------------------------

    def start(self, **inputs: Any) -> None:
        """Check everything, start the stack, and run. Nothing is left where it fails."""
        from kit.cluster import progress
        from kit.lifecycle.acquire import acquire_stack
        from kit.stack.calls import HeadDiedError, TrainerDiedError, while_starting
        from kit.viz.live.progress import Starting

        begin = time.perf_counter()
        before = running.to_be_replaced()
        stack = self.prepare(**inputs)  # what is wrong is refused before anything ends
        if before:
            running.replace(before, stack)
        try:
            with held():
                warm = acquire_stack(stack)
                self.state.config = stack.settings.config  # its name may have got a number
                running.add(self)
            folder = stack.cluster.directory
            with Starting(lambda: progress.read(folder), (folder / "address").exists):
                self.sampler.load_tokenizer()  # while the stack's first process starts
                if warm:
                    try:
                        stack.reset()
                        for fork in journal.forks(folder):  # of whoever had it before
                            journal.forget_fork(folder, fork)
                    except StackError:  # what was left warm is broken: a new one, then
                        stack.close()
                        acquire_stack(stack, fresh=True)
                        stack.start()
                else:
                    stack.start()
                check_agreement(self.state.config, stack, self.sampler)
            with held():
                self.run(stack)
        except BaseException as error:
            told = None
            if isinstance(error, (HeadDiedError, TrainerDiedError)):
                told = while_starting(error, stack.cluster)
            self.abandon()
            stack.close()
            if told:
                raise told from error
            raise
        self.start_seconds = time.perf_counter() - begin

    def prepare(
        self,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
        advantage: Advantage | None = None,
        loss: Callable[..., Any] | None = None,
    ) -> Stack:
        """Check all that can be checked before a process runs; returns the stack to start."""
        working_folder()  # without one, importing torch ends the process
        check_hidden_packages()
        from kit.cluster.placement import check_devices
        from kit.engine.server_args import check_attention, check_extra
        from kit.memory.plan import plan_for
        from kit.models import dropout, families, low_precision
        from kit.models.source import find
        from kit.rewards.signature import check_reward
        from kit.stack.stack import Stack
        from kit.utils.hardware import pick_device

        config = self.state.config
        device = pick_device(config.device, joins=config.cluster.address is not None)
        model = find(config.model)
        warn_of_dropout(config.model.name, dropout.configured(model.path))
        self.sampler = sampler = PromptSampler.load(config, model, data, eval_data)
        self.reward = (
            build(config.reward, sampler.train.default_reward) if reward is None else reward
        )
        check_reward(self.reward)
        check_extra(dict(config.engine.extra))
        check_attention(config.engine, device)
        check_experts(config, model)
        families.find(model.architecture).check(config, model.path, device)
        used = min(tokens_used(sampler), model.context_length)
        families.check_rotation(model.path, used)
        low_precision.check_session(config, model, device)
        check_optimizer(config.training)
        check_peft(config)
        draft = find_draft(config, model)
        check_devices(config, model, device)
        plan = plan_for(config, model, device, sampler.max_response_len)
        keep = sampler.fits if config.data.filter_overlong_prompts else None
        self.state.stream = PromptStream(sampler.train, config.seed, config.data.shuffle, keep)
        self.advantage = advantage
        check_functions(config.training, advantage, loss)
        self.state.inputs = Inputs.of(
            data=data, eval_data=eval_data, reward=reward, advantage=advantage, loss=loss
        )
        stack = Stack(config, model, device, sampler.max_response_len, plan, loss, draft)
        self.collector = RolloutCollector(self.state, sampler, stack)
        return stack

    def run(self, stack: Stack) -> None:
        """Run with a stack that is up; from here on it outlives this process for a while."""
        from kit.stack.actors import fingerprint

        config, recorder = self.state.config, current_run()
        LIMIT.seconds = config.reward.timeout
        self._record(stack, stack.slots.first, recorder)
        self.note()
        # A batch run's kernel never comes back to attach.
        lease = 0.0 if recorder else config.stack.lease
        stack.cluster.ready(lease, fingerprint=fingerprint(stack.settings))
        running.add(self)
        self._at_exit = at_exit(self._end_of_process)

    def run_fork(self, root: SessionParts, stack: Stack, slot: Slot) -> None:
        """Run beside others on a stack, in a slot that is open; it ends with the root's."""
        self.root, self.forks, self.fork_name = root, root.forks, slot.name
        recorder = root.tracker.recorder
        self._record(stack, slot, recorder and recorder.of_fork(slot.name))
        self.forks[slot.name] = self

    def _record(self, stack: Stack, slot: Slot, recorder: Recorder | None) -> None:
        """Run in a slot of a stack, with files, loggers and a journal of its own."""
        self._stack, self.slot, self.phase = stack, slot, "running"
        self._process = os.getpid()
        config = self.state.config
        if recorder:
            recorder.start(config, self.state.inputs.described)
        loggers = tracking.start(config, recorder.folder if recorder else None)
        self.tracker = Tracker(recorder, loggers)
        notes = stack.cluster.directory
        if slot is not stack.slots.first:
            notes = journal.of_fork(notes, slot.name)
        self.journal = Journal(notes, self.state, stack.trainers, self.snapshots)
        self._note_inputs()

    def _note_inputs(self) -> None:
        """Write down what does not change: how a session with these parts can be made again."""
        described = dict(self.state.inputs.described)
        self.journal.start({"inputs": described, "info": self.stack.description})

    def abandon(self) -> None:
        """Be without a stack again, after a start that failed."""
        running.discard(self)
        self._stack, self.slot, self.phase = None, None, "not started"
        if self.tracker.loggers:
            self.tracker.loggers.close()
        self.tracker = Tracker()

    # ---- while it runs -------------------------------------------------------------------------

    def note(self) -> None:
        """Write the journal; called after every verb."""
        if self._stack:
            _ = self.stack  # counts an update that nobody waited for
            self.journal.note()

    def take_reward(self, reward: Reward) -> None:
        """Make a reward the session's own. Raises RewardError for one that cannot be called."""
        from kit.rewards.signature import check_reward

        check_reward(reward)
        self.reward = reward
        described = {**self.state.inputs.described, **Inputs.of(reward=reward).described}
        self.state.inputs = Inputs(described)
        self._note_inputs()

    def use(self, config: SessionConfig) -> None:
        """Continue with other settings, as far as they may change while the session runs."""
        before, stack = self.state.config, self.stack
        now = config.training, config.rollout.temperature
        if now != (before.training, before.rollout.temperature):
            stack.configure(*now)
        self.state.config = self.sampler.config = config
        LIMIT.seconds = config.reward.timeout

    def begin_training(self, total: int) -> int:
        """Begin a training of so many steps; returns how many a checkpoint held."""
        recorder = self.tracker.recorder
        if recorder is None:
            return 0
        with self.turn():
            done = resume.begin_training(self.state, self.stack, recorder, self.use, total)
            if recorder.settings.attempt > 1:
                self.note()
        return done

    def end_training(self) -> None:
        """End the training: later checkpoints belong to none."""
        if self.tracker.recorder:
            self.tracker.recorder.training = None

    # ---- end -----------------------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """Whether the session can only be continued from a checkpoint."""
        return bool(self._stack and self.slot and self._stack.has_lost(self.slot))

    def close(self, *, keep_warm: bool = False) -> None:
        """End every process, or leave them warm; of a fork only itself. Safe to call again."""
        self.refuse_in_fork()
        if self.root is not self:
            self._close_fork()
            return
        seconds = self.state.config.stack.keep_warm or (WARM_SECONDS if keep_warm else 0.0)
        if current_run():
            grouped = RunSettings.here().keep_warm * 60 or WARM_SECONDS
            seconds = grouped if current_group() else 0.0
        with held():  # a stack that is closed by half could not be reached any more
            stack, whole = self._let_go()
            if stack and seconds and whole:
                stack.leave(seconds, warm=True)
            elif stack:
                stack.close()

    def _close_fork(self) -> None:
        """Free the fork's slot; the others on its stack go on."""
        training = self.lock.training
        while training and not training.close(CLOSE_SECONDS):
            pass  # its step is not to be torn off a stack that others use
        with self.lock.take("close"), held():
            stack, slot = self._stack, self.slot
            if stack and slot:
                self._detach()
                journal.forget_fork(stack.cluster.directory, slot.name)
                stack.drop(slot)

    def _let_go(self) -> tuple[Stack | None, bool]:
        """Stop training and detach, forks too: (the stack, if there is one; whether all its parts
        live).
        """
        stack = self._stack
        if stack is None:
            return None, False
        members = [*self.forks.values(), self]
        trainings = [member.lock.training for member in members]
        late = [each for each in trainings if each and not each.close(CLOSE_SECONDS)]
        for member in members:
            member._detach()
        if late:
            stack.halt()  # else their threads would wait in a Ray that goes away
            for training in late:
                training.close(CLOSE_SECONDS)
        running.discard(self)
        atexit.unregister(self._at_exit)
        return stack, not late and not stack.watch.dead()

    def _detach(self) -> None:
        """Be closed, and without a stack."""
        self._last_versions = self._versions()
        self._stack, self.slot, self.phase = None, None, "closed"
        self.snapshots.clear()
        if self.tracker.loggers:
            self.tracker.loggers.close()
        self.forks.pop(self.fork_name, None)

    def _end_of_process(self) -> None:
        """Close at exit; a kernel that restarts leaves its stack to the next one."""
        lease = self.state.config.stack.lease
        if self._stack and _kernel_restarts() and lease and not self.tracker.recorder:
            stack, self._stack = self._stack, None
            stack.leave(lease, warm=False)
        else:
            if self._stack:
                self._stack.cluster.ends_with_us()  # Jupyter kills a kernel that takes long to end
            self.close()

    # ---- what it shows of itself ---------------------------------------------------------------

    def overview(self) -> SessionState:
        """State of the session, without asking the stack, which may be busy."""
        state, stack, last = self.state, self._stack, self.state.last_rollout
        return SessionState(
            name=self.fork_name or state.config.name,
            fork_of=self.root.state.config.name if self.fork_name else "",
            forks=tuple(name for name in self.forks if name != self.fork_name),
            state=self.phase,
            model=state.config.model.name,
            parameters=stack.info.get("parameters") if stack else None,
            device=stack.device if stack else state.config.device,
            dtype=stack.dtype if stack else state.config.model.dtype,
            step=state.step,
            planned=state.config.training.num_rollout,
            weight_version=self.weight_version,
            engine_version=self.engine_version,
            last_reward=last.mean_reward() if last and last.rewards() else None,
            rewards=tuple(state.rewards),
            waiting=len(state.buffer),
            host_memory=stack.cluster.host_memory() if stack else None,
            next_calls=self._next_calls(),
            trained=stack.info.get("trained") if stack and state.config.model.lora else None,
            lora=state.config.model.lora,
            quantized=state.config.quantized,
            drafts=state.config.drafts,
            first_prompt=self.sampler.first_prompt if stack else None,
        )

    def _next_calls(self) -> tuple[tuple[str, str], ...]:
        """Useful next calls, each with a description; the most likely first."""
        if self.phase != "running":
            again = ("session = RLSession.start(...)", "start a session")
            load = ("session = RLSession.load(path)", "continue a saved one")
            return (again, load) if self.phase == "closed" else (again,)
        calls = []
        if self.engine_version != self.weight_version:
            calls.append(("session.sync()", "the engine still generates with older weights"))
        last = self.state.last_rollout
        if last is None or not last.written_by({self.weight_version}):
            words = "write responses with the present weights"
            calls.append(("rollout = session.generate()", words))
        elif not last.rewards():
            calls.append(("rollout = session.score(rollout)", "give the last rollout its rewards"))
        else:
            calls.append(("batch = session.advantages(rollout)", "what an update would see"))
            calls.append(("session.update(batch)", "train on it"))
        calls.append(("session.train(20)", "whole steps, shown live"))
        calls.append(("session.snapshot()", "keep this moment, to undo what comes next"))
        if self.state.step:
            calls.append(("session.evaluate()", "accuracy on held-out prompts"))
            calls.append(("session.save()", "keep where it stands"))
        return tuple(calls)


def _kernel_restarts() -> bool:
    """Whether this process ends because Jupyter was told to restart its kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    message = getattr(getattr(shell, "kernel", None), "_shutdown_message", None)
    return bool(message and message["content"].get("restart"))
