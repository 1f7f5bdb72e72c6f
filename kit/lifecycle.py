"""How a session starts and ends: everything is checked first, and nothing is left behind."""

from __future__ import annotations

import atexit
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kit.config import SessionConfig
from kit.data.buffer import Buffer
from kit.data.stream import PromptStream
from kit.errors import SessionError
from kit.prompting import Prompting
from kit.reports import Metrics
from kit.rewards import build
from kit.rewards.limits import LIMIT
from kit.runs.record import Recorder, current_run
from kit.samples import Batch, Rollout
from kit.snapshots import Snapshot
from kit.turns import Turns

if TYPE_CHECKING:
    from kit.doctor import Diagnosis
    from kit.rewards.runner import Reward
    from kit.stack.stack import Stack
    from kit.training import Training

CLOSE_SECONDS = 1.0
"""How long closing waits for a training step to end by itself."""


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
        self._buffer = Buffer()
        self._generations = 0
        self._stack: Stack | None = None
        self._state = "not started"
        self._turns = Turns()
        self._snapshots: dict[str, Snapshot] = {}

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
        session = cls(config)
        session._start(data, eval_data, reward)
        return session

    def _start(self, data: Any, eval_data: Any, reward: Reward | None) -> None:
        from kit.memory.for_session import plan_for
        from kit.model.source import find
        from kit.rewards.runner import check_reward
        from kit.stack.engine import check_extra
        from kit.stack.stack import Stack, pick_device
        from kit.viz.starting import Starting

        begin = time.perf_counter()
        config = self.config
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
        device = pick_device(config.device)
        model = find(config.model)
        self._prompting = Prompting.load(config, model, data, eval_data)
        self._reward = (
            build(config.reward, self._prompting.train.default_reward) if reward is None else reward
        )
        check_reward(self._reward)
        LIMIT.seconds = config.reward.timeout
        check_extra(dict(config.engine.extra))
        plan = plan_for(config, model, device, self._prompting.max_response_len)
        stack = Stack(config, model, device, self._prompting.max_response_len, plan)
        _running.add(self)
        try:
            with Starting(stack.cluster.directory):
                self._prompting.load_tokenizer()  # while the stack's first process starts
                self._stream = PromptStream(self._prompting.train, config.seed, config.data.shuffle)
                stack.start()
        except BaseException:
            _running.discard(self)
            stack.close()
            raise
        self._stack, self._state = stack, "running"
        self._recorder: Recorder | None = current_run()
        if self._recorder:
            self._recorder.start(config)
        me = weakref.ref(self)

        def close_at_exit() -> None:
            if session := me():
                session.close()

        atexit.register(close_at_exit)
        self.start_seconds = time.perf_counter() - begin

    def close(self) -> None:
        """End every process of this session, and a training that runs. Safe to call again."""
        stack, training = self._stack, self.training
        if stack:
            ended = training is None or training.close(CLOSE_SECONDS)
            self._engine_had, self._trainer_had = stack.engine_version, stack.trainer_version
            self._stack, self._state = None, "closed"
            self._snapshots.clear()
            if training and not ended:
                stack.halt()  # else its thread would wait in a Ray that goes away
                training.close(CLOSE_SECONDS)
            stack.close()
            _running.discard(self)

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
        from kit.overview import overview
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
