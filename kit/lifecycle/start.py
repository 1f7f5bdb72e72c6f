"""How a session starts and ends: everything is checked first, and nothing is left behind.

start ── a stack of its own, or one that was left warm, begun anew ──┐
attach ── the stack of a kernel that is gone, as it was ─────────────┤
                                                                     ▼
                                                                  running
close ── every process ends; or it is left warm ◄────────────────────┤
the kernel restarts or is killed: the stack waits for `attach` ◄─────┘

Where a session stands: what it shows of itself, and what to call next.
"""

from __future__ import annotations

import atexit
import sys
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kit import tracking
from kit.config import SessionConfig
from kit.data.stream import PromptStream
from kit.errors import SessionError, StackError
from kit.lifecycle import attach
from kit.lifecycle.debug import Debug
from kit.lifecycle.journal import Journal
from kit.lifecycle.lock import Turns
from kit.lifecycle.resume import Pace
from kit.reports import REWARD, Metrics, SessionState, StepReport
from kit.reports.runs import RunSettings
from kit.reports.status import Sessions, Snapshot
from kit.rewards import build
from kit.rewards.timeouts import LIMIT
from kit.rollout.collector import Buffer
from kit.rollout.sampler import Prompting
from kit.samples import Batch, Rollout
from kit.tracking.recorder import Recorder, as_the_run_says, current_group, current_run
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.doctor import Diagnosis
    from kit.lifecycle.train_loop import Training
    from kit.rewards.runner import Reward
    from kit.stack.stack import Stack


CLOSE_SECONDS = 1.0
"""How long closing waits for a training step to end by itself."""


WARM_SECONDS = 600.0
"""How long a stack is left warm where no setting says it."""


class Lifecycle:
    """The part of `RLSession` that is not a verb: its state, its start and its end."""

    def __init__(self, config: SessionConfig | str | Path = "tiny") -> None:
        """A session that is not running yet; `RLSession.start` makes one that is."""
        self.config = SessionConfig.of(config)
        self.step_count = 0
        """Updates applied so far."""
        self._engine_had = self._trainer_had = 0
        self.history: list[Metrics] = []
        """One row of metrics a step."""
        self.last_rollout: Rollout | None = None
        self.last_batch: Batch | None = None
        """What `update` was last given, also where it was refused."""
        self._last_step: StepReport | None = None
        """The last one whose update was made and handed over, even if interrupted after that."""
        self._buffer = Buffer()
        self._generations = 0
        self._stack: Stack | None = None
        self._state = "not started"
        self._turns = Turns()
        self._snapshots: dict[str, Snapshot] = {}
        self._recorder: Recorder | None = None
        self._pace = Pace()

    @classmethod
    def start(
        cls,
        config: SessionConfig | str | Path = "tiny",
        *,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
    ) -> Self:
        """Check everything that can be checked, start the stack, and return a running session.

        Args:
            config: a SessionConfig, a preset's name, or the path of a YAML file.
            data: training prompts instead of `data.source`: another source, a list of rows, or a
                `datasets.Dataset`.
            eval_data: held-out prompts in the same forms.
            reward: a function `f(sample) -> float` or `f(samples) -> list[float]`, or a built-in's
                name, instead of `reward` in the configuration.

        Raises:
            ConfigError, DataError, ModelError, RewardError: what the message names is wrong.
            StackError: a process could not start. In every case none is left behind.
        """
        session = cls(as_the_run_says(config))
        session._start(data, eval_data, reward)
        return session

    @classmethod
    def attach(
        cls,
        name: str | None = None,
        *,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
    ) -> Self:
        """Go on with a session whose kernel was restarted or killed, from where it was.

        Steps, weights, optimizer, place in the data, randomness, buffer, metrics and the last
        rollout are as they were. A step that was under way has either been completed or not begun.
        Snapshots in memory went with the kernel.

        Args:
            name: of the session; None takes the only one there is. `RLSession.sessions()` lists
                them.
            data: as in `start`; rows and functions that were passed there went with the kernel,
                and have to be passed again.
            eval_data: as in `start`.
            reward: as in `start`.

        Raises:
            SessionError: there is no such session, a living process drives it, or something has to
                be passed again.
        """
        _refuse_a_second_one()
        return attach.attach(cls, name, data, eval_data, reward)

    @staticmethod
    def sessions() -> Sessions:
        """Your sessions on this machine: what lives, who drives it, and until when it waits."""
        return attach.sessions()

    def _start(self, data: Any, eval_data: Any, reward: Reward | None) -> None:
        from kit.lifecycle import acquire
        from kit.stack.recovery import begin_anew
        from kit.viz.live.progress import Starting

        begin = time.perf_counter()
        _refuse_a_second_one()
        stack = self._prepare(data, eval_data, reward)
        try:
            with held():
                warm = acquire.launch(stack)
                self.config = stack.config  # it may have got a number behind its name
                _running.add(self)
            with Starting(stack.cluster.directory):
                self._prompting.load_tokenizer()  # while the stack's first process starts
                if warm:
                    try:
                        begin_anew(stack)
                    except StackError:  # what was left warm is broken: a new one, then
                        stack.close()
                        acquire.launch(stack, anew=True)
                        stack.start()
                else:
                    stack.start()
            with held():
                self._run(stack)
        except BaseException:
            _running.discard(self)
            self._stack, self._state = None, "not started"
            stack.close()
            raise
        self.start_seconds = time.perf_counter() - begin

    def _prepare(self, data: Any, eval_data: Any, reward: Reward | None) -> Stack:
        """Check everything that can be checked before a process runs."""
        from kit.cluster.placement import check_devices
        from kit.engine.server_args import check_extra
        from kit.memory.plan import plan_for
        from kit.models.source import find
        from kit.rewards.runner import check_reward
        from kit.stack.stack import Stack
        from kit.utils.hardware import pick_device

        config = self.config
        device = pick_device(config.device, joins=config.cluster.address is not None)
        model = find(config.model)
        self._prompting = Prompting.load(config, model, data, eval_data)
        self._reward = (
            build(config.reward, self._prompting.train.default_reward) if reward is None else reward
        )
        check_reward(self._reward)
        LIMIT.seconds = config.reward.timeout
        check_extra(dict(config.engine.extra))
        check_devices(config, model, device)
        plan = plan_for(config, model, device, self._prompting.max_response_len)
        self._stream = PromptStream(self._prompting.train, config.seed, config.data.shuffle)
        self._passed = {
            "data": data is not None,
            "eval_data": eval_data is not None,
            "reward": reward if isinstance(reward, str) else reward is not None,
        }
        return Stack(config, model, device, self._prompting.max_response_len, plan)

    def _run(self, stack: Stack) -> None:
        """The stack is up: from now on the session runs, and outlives this process for a while."""
        from kit.stack.recovery import fingerprint

        self._stack, self._state = stack, "running"
        self._recorder = current_run()
        self._pace = Pace()
        if self._recorder:
            self._recorder.start(self.config)
        self._loggers = tracking.start(
            self.config, self._recorder.folder if self._recorder else None
        )
        self._journal = Journal(stack.cluster.directory)
        self._journal.start({"passed": self._passed, "info": stack.description})
        self._note()
        # A batch run has nobody who would come back for it.
        lease = 0.0 if self._recorder else self.config.stack.lease
        stack.cluster.ready(lease, fingerprint=fingerprint(stack))
        _running.add(self)
        me = weakref.ref(self)

        def at_exit() -> None:
            if session := me():
                session._end_of_process()

        atexit.register(at_exit)

    def _note(self) -> None:
        """Write down where the session is; called after every verb."""
        if self._stack:
            self._journal.note(self)

    def close(self, *, keep_warm: bool = False) -> None:
        """End every process of this session, and a training that runs. Safe to call again.

        Args:
            keep_warm: leave the processes to the next start with the same engine settings, which
                then takes about a second; they end by themselves after `stack.keep_warm` seconds,
                or ten minutes where that is 0. What was trained is gone: `save` it first.
        """
        seconds = self.config.stack.keep_warm or (WARM_SECONDS if keep_warm else 0.0)
        if current_run():
            seconds = _warm_seconds() if current_group() else 0.0
        with held():  # closed by half, nobody could reach the stack any more
            stack, whole = self._let_go()
            if stack and seconds and whole:
                stack.leave(seconds, warm=True)
            elif stack:
                stack.close()

    def _let_go(self) -> tuple[Stack | None, bool]:
        """Stop training, and be closed: (the stack, if there is one; has it all its parts?)."""
        stack, training = self._stack, self.training
        if stack is None:
            return None, False
        ended = training is None or training.close(CLOSE_SECONDS)
        self._engine_had, self._trainer_had = stack.engine_version, stack.trainer_version
        self._stack, self._state = None, "closed"
        self._snapshots.clear()
        if self._loggers:
            self._loggers.close()
        if training and not ended:
            stack.halt()  # else its thread would wait in a Ray that goes away
            training.close(CLOSE_SECONDS)
        _running.discard(self)
        return stack, ended and not stack.watch.dead()

    def _end_of_process(self) -> None:
        """Close; but a kernel that is restarted leaves its stack to the next one."""
        if self._stack and _kernel_restarts() and self.config.stack.lease and not self._recorder:
            stack, self._stack = self._stack, None
            stack.leave(self.config.stack.lease, warm=False)
        else:
            if self._stack:
                self._stack.cluster.ends_with_us()  # Jupyter kills a kernel that takes long to end
            self.close()

    def doctor(self) -> Diagnosis:
        """What this machine has for the session's settings, running or not; see `kit.doctor`."""
        from kit.doctor import diagnose

        return diagnose(self.config)

    @staticmethod
    def current() -> Lifecycle | None:
        """The session that runs in this process, for when its name was lost; None without one."""
        return next(iter(_running), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def engine_version(self) -> int:
        """The weights that the engine generates with; the trainer's are `weight_version`."""
        return self._stack.engine_version if self._stack else self._engine_had

    @property
    def weight_version(self) -> int:
        """The weights that the trainer holds. Each update gives them a number that no other weights
        of the session ever have: as many as there were updates, and more after an undo.
        """
        return self._stack.trainer_version if self._stack else self._trainer_had

    @property
    def debug(self) -> Debug:
        """What stands behind the session, for tests and curious people: no promise that it stays.

        `stack`, `sampler`, `lock`, `snapshots`, `reward`, `loggers`, `recorder`, and
        `state.{step, rollouts_drawn, stream, buffer}`.
        """
        return Debug(self)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, from Transformers."""
        return self._prompting.tokenizer

    def __repr__(self) -> str:
        groups = len(self._buffer)
        waiting = f", groups waiting to be continued: {groups}" if groups else ""
        return (
            f"RLSession({self.config.name!r}, {self._state}, model {self.config.model.name}, "
            f"step {self.step_count}, engine holds weights {self.engine_version}{waiting})"
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from kit.viz import show_report

        return show_report(overview(self))

    @property
    def training(self) -> Training | None:
        """The last training that had a dashboard: to pause, resume or stop it from a cell."""
        return self._turns.training

    def _next_seed(self) -> str:
        """What the next draw of responses takes its randomness from."""
        self._generations += 1
        return f"{self.config.seed} rollout {self._generations}"

    @property
    def _running(self) -> Stack:
        if self._stack is None:
            raise SessionError(
                f"The session is {self._state}.",
                fix="make a running one with `session = RLSession.start(...)`"
                + ("" if self._state == "not started" else ", or `RLSession.load(path)`")
                + ".",
            )
        self.step_count += self._stack.settle()
        return self._stack


_running: weakref.WeakSet[Lifecycle] = weakref.WeakSet()


def _refuse_a_second_one() -> None:
    other = Lifecycle.current()
    if other and other._stack and other._stack.lost:
        other.close()  # only a checkpoint can bring it back, in a stack of its own
        other = None
    if other is not None:
        raise SessionError(
            f"The session {other.config.name!r} is running in this process already.",
            why="A process drives one stack at a time.",
            fix="go on with it (`session = RLSession.current()`), or end it first: "
            "`RLSession.current().close()`.",
        )


def _warm_seconds() -> float:
    return RunSettings.here().keep_warm * 60 or WARM_SECONDS


def _kernel_restarts() -> bool:
    """Does this process end because Jupyter was told to restart its kernel?"""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    message = getattr(getattr(shell, "kernel", None), "_shutdown_message", None)
    return bool(message and message["content"].get("restart"))


def overview(session: Lifecycle) -> SessionState:
    """Everything that is known without asking a process of the stack, which may be busy."""
    stack, last = session._stack, session.last_rollout
    rewards = tuple(row[REWARD] for row in session.history if REWARD in row)
    return SessionState(
        name=session.config.name,
        state=session._state,
        model=session.config.model.name,
        parameters=stack.info.get("parameters") if stack else None,
        device=stack.device if stack else session.config.device,
        dtype=stack.dtype if stack else session.config.model.dtype,
        step=session.step_count,
        planned=session.config.training.num_rollout,
        weight_version=session.weight_version,
        engine_version=session.engine_version,
        last_reward=last.mean_reward() if last and last.rewards() else None,
        rewards=rewards,
        waiting=len(session._buffer),
        host_memory=stack.host_memory() if stack else None,
        next_calls=_next(session),
    )


def _next(session: Lifecycle) -> tuple[tuple[str, str], ...]:
    """Calls that make sense now, each with what it does; the most likely one first."""
    if session._state != "running":
        again = ("session = RLSession.start(...)", "start a session")
        load = ("session = RLSession.load(path)", "continue a saved one")
        return (again, load) if session._state == "closed" else (again,)
    calls = []
    if session.engine_version != session.weight_version:
        calls.append(("session.sync()", "the engine still generates with older weights"))
    last = session.last_rollout
    if last is None or not last.written_by({session.weight_version}):
        calls.append(("rollout = session.generate()", "write responses with the present weights"))
    elif not last.rewards():
        calls.append(("rollout = session.score(rollout)", "give the last rollout its rewards"))
    else:
        calls.append(("batch = session.advantages(rollout)", "what an update would see"))
        calls.append(("session.update(batch)", "train on it"))
    calls.append(("session.train(20)", "whole steps, shown live"))
    calls.append(("session.snapshot()", "keep this moment, to undo what comes next"))
    if session.step_count:
        calls.append(("session.evaluate()", "accuracy on held-out prompts"))
        calls.append(("session.save()", "keep where it stands"))
    return tuple(calls)
