"""`RLSession`: the object that notebooks drive. Verbs only.

    session = RLSession.start("tiny")
    rollout = session.generate()
    rollout = session.score(rollout)
    batch   = session.advantages(rollout)
    report  = session.update(batch)
    session.sync()

`step()` is those five in order; `train(n)` is a loop of `step()`. Each verb returns a frozen
result that shows itself.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kit import checkpoint, mismatch
from kit.config import SessionConfig
from kit.data.stream import PromptStream
from kit.errors import DataError, SessionError
from kit.metrics import pass_at_k, rollout_metrics
from kit.prompting import Prompting, as_rows
from kit.reports import (
    EvalReport,
    Metrics,
    MismatchReport,
    StepReport,
    SyncReport,
    TrainReport,
    UpdateReport,
)
from kit.rewards import build, score_samples
from kit.rewards.runner import failure_summary
from kit.runs.record import Recorder, current_run
from kit.samples import Batch, Messages, Rollout, Status

if TYPE_CHECKING:
    from kit.rewards.runner import Reward
    from kit.stack.stack import Stack


class RLSession:
    """One model in training, with its engine, its trainer, its prompts and its reward."""

    def __init__(self, config: SessionConfig | str | Path = "tiny") -> None:
        """A session that is not running yet; `RLSession.start` makes one that is."""
        self.config = SessionConfig.of(config)
        self.step_count = 0
        """Updates applied so far."""
        self.engine_version = 0
        """The weight version that the engine generates with; the trainer's is `step_count`."""
        self.history: list[Metrics] = []
        """One row of metrics a step."""
        self.last_rollout: Rollout | None = None
        self._generations = 0
        self._stack: Stack | None = None
        self._state = "not started"

    # ---- starting and ending -------------------------------------------------------------------

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
        from kit.model.source import find
        from kit.stack.engine import check_extra
        from kit.stack.stack import Stack, pick_device

        begin = time.perf_counter()
        config = self.config
        device = pick_device(config.device)
        model = find(config.model)
        self._prompting = Prompting.load(config, model, data, eval_data)
        self._reward = reward or build(config.reward, self._prompting.train.default_reward)
        check_extra(dict(config.engine.extra))
        stack = Stack(config, model, device)
        try:
            self._prompting.load_tokenizer()  # while the stack's first process starts
            self._stream = PromptStream(self._prompting.train, config.seed, config.data.shuffle)
            stack.start()
        except BaseException:
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
        """End every process of this session. Safe to call again."""
        stack, self._stack = self._stack, None
        if stack:
            self._state = "closed"
            stack.close()

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
    def _running(self) -> Stack:
        if self._stack is None:
            raise SessionError(
                f"The session is {self._state}.",
                fix="make a running one with `session = RLSession.start(...)`"
                + ("" if self._state == "not started" else ", or `RLSession.load(path)`")
                + ".",
            )
        return self._stack

    # ---- the verbs -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str | Messages] | None = None,
        *,
        n_samples_per_prompt: int | None = None,
        temperature: float | None = None,
    ) -> Rollout:
        """Write responses: to the next prompts of the training data, or to these.

        Args:
            prompts: prompts of your own, instead of the next `rollout_batch_size` of the data.
            n_samples_per_prompt: responses to each; None takes the configured number.
            temperature: 0 is greedy; None takes the configured one.
        """
        stack, training = self._running, self.config.training
        rows = as_rows(prompts) or self._stream.next(training.rollout_batch_size)
        self._generations += 1
        rollout = self._prompting.generate(
            stack,
            rows,
            n_samples_per_prompt or training.n_samples_per_prompt,
            temperature,
            seed=f"{self.config.seed} rollout {self._generations}",
            step=self.step_count,
        )
        self.last_rollout = rollout
        return rollout

    def score(self, rollout: Rollout, reward: Reward | None = None) -> Rollout:
        """The same rollout with rewards. A sample whose reward fails is marked, and says why.

        Args:
            rollout: what `generate` returned.
            reward: a function or a built-in's name, instead of the session's.

        Raises:
            RewardError: a function for all samples returned the wrong number of values.
        """
        scored = replace_samples(rollout, score_samples(rollout.samples, reward or self._reward))
        self.last_rollout = scored
        return scored

    def advantages(self, rollout: Rollout) -> Batch:
        """What an update will see: each sample's reward against its group's (GRPO).

        A group with a failed or aborted sample is left out whole: its mean would be of other
        samples than were drawn.

        Raises:
            SessionError: the rollout has no rewards yet.
        """
        import torch

        from kit.algo.advantages import group_normalize

        samples, left_out = [], []
        for group in rollout.groups():
            bad = [s for s in group if s.status in (Status.FAILED, Status.ABORTED)]
            if not bad and any(s.reward is None for s in group):
                raise SessionError(
                    "The rollout has no rewards.", fix="call `rollout = session.score(rollout)`."
                )
            if bad:
                why = failure_summary(bad) or [f"{len(bad)} aborted"]
                left_out.append(f"group {group[0].group_index}: {'; '.join(why)}")
            else:
                samples += [s for s in group if s.response_length]
        advantage_N = group_normalize(
            torch.tensor([s.reward for s in samples], dtype=torch.float64),
            torch.tensor([s.group_index for s in samples], dtype=torch.int64),
            self.config.training.grpo_std_normalization,
        )
        return Batch(tuple(samples), tuple(advantage_N.tolist()), rollout.step, tuple(left_out))

    def update(self, batch: Batch) -> UpdateReport:
        """Train on a batch. The same batch again, by a cell run twice, changes nothing.

        Raises:
            StackError: loss or gradient is not finite; the weights are as before.
        """
        from kit.stack.trainer import TrainBatch

        stack, begin = self._running, time.perf_counter()
        if not batch.samples:
            return UpdateReport(self.step_count, {}, (), 0, 0, 0.0, batch.left_out, applied=False)
        samples = batch.samples
        logged = all(s.rollout_log_probs is not None for s in samples)
        per_step, applied = stack.update(
            TrainBatch(
                tokens=[s.tokens for s in samples],
                response_lengths=[s.response_length for s in samples],
                loss_masks=[s.mask for s in samples],
                advantages=list(batch.advantages),
                rollout_log_probs=[s.rollout_log_probs or [] for s in samples] if logged else None,
            ),
            batch.id,
        )
        step = self.step_count
        self.step_count += applied
        names = per_step[0]
        return UpdateReport(
            step=step,
            metrics={n: sum(row[n] for row in per_step) / len(per_step) for n in names},
            per_step=tuple(per_step),
            samples=len(samples),
            tokens=sum(len(s.tokens) for s in samples),
            seconds=time.perf_counter() - begin,
            left_out=batch.left_out,
            applied=applied,
        )

    def sync(self) -> SyncReport:
        """Hand the trainer's weights to the engine, which forgets all it cached of old ones."""
        begin = time.perf_counter()
        tensors, size = self._running.sync(self.step_count)
        self.engine_version = self.step_count
        return SyncReport(self.step_count, time.perf_counter() - begin, tensors, size)

    def check_mismatch(self, rollout: Rollout | None = None) -> MismatchReport:
        """Recompute a rollout's log-probs in the trainer and compare, token by token.

        Args:
            rollout: None takes the last one; with none so far, one is generated.
        """
        stack = self._running
        rollout = rollout or self.last_rollout or self.generate()
        samples = [s for s in rollout if s.response_length and s.rollout_log_probs]
        if not samples:
            raise DataError("The rollout has no tokens with log-probs to compare.")
        values = stack.log_probs([s.tokens for s in samples], [s.response_length for s in samples])
        return mismatch.compare(
            samples,
            values,
            config=self.config.mismatch,
            dtype=stack.dtype,
            trainer_version=self.step_count,
            token_text=self._prompting.token_text,
        )

    def step(self) -> StepReport:
        """One whole step: generate, score, advantages, update, sync."""
        begin, index, config = time.perf_counter(), self.step_count, self.config
        rollout = self.score(self.generate())
        checked = self.check_mismatch(rollout) if _due(index, config.mismatch.interval) else None
        update = self.update(self.advantages(rollout))
        if not update.applied:
            raise SessionError(
                "No group of this rollout could be trained on.",
                why="\n".join(update.left_out[:4]),
                fix="mend the reward function; the message above is its own.",
            )
        sync = self.sync()
        seconds = time.perf_counter() - begin
        metrics = rollout_metrics(rollout) | update.metrics
        metrics |= {
            "perf/rollout_time": rollout.seconds,
            "perf/actor_train_time": update.seconds,
            "perf/update_weights_time": sync.seconds,
            "perf/step_time": seconds,
            "perf/tokens_per_gpu_per_sec": sum(s.response_length for s in rollout)
            / rollout.seconds,
        }
        evaluated = self.evaluate() if _due(index + 1, config.evaluation.interval) else None
        if evaluated:
            metrics |= evaluated.metrics
        self.history.append(metrics)
        if self._recorder:
            self._recorder.step(metrics, index)
        return StepReport(index, metrics, rollout, update, sync, checked, evaluated)

    def train(
        self,
        steps: int | None = None,
        *,
        until: Callable[[StepReport], bool] | None = None,
        show: bool = True,
    ) -> TrainReport:
        """A loop of `step()`, shown live. Interrupting it keeps the steps that are done.

        Args:
            steps: None takes the configured `num_rollout`.
            until: called after each step; True ends training.
            show: draw the progress while training.
        """
        from kit.viz.progress import Progress

        total, begin = steps or self.config.training.num_rollout, time.perf_counter()
        done: list[StepReport] = []
        stopped = ""
        with Progress(total, enabled=show) as progress:
            try:
                for _ in range(total):
                    done.append(self.step())
                    progress.update(done[-1])
                    if until and until(done[-1]):
                        stopped = "the condition given as `until` was met"
                        break
            except KeyboardInterrupt:
                stopped = f"interrupted in step {self.step_count}"
        return TrainReport(
            steps=tuple(done),
            evaluations=tuple(s.evaluation for s in done if s.evaluation),
            seconds=time.perf_counter() - begin,
            stopped=stopped,
            history=tuple(self.history),
        )

    def evaluate(
        self, *, n_samples_per_prompt: int | None = None, temperature: float | None = None
    ) -> EvalReport:
        """Accuracy on held-out prompts, with the weights that the engine has now.

        Args:
            n_samples_per_prompt: None takes `evaluation.n_samples_per_prompt`.
            temperature: 0 is greedy; None takes `evaluation.temperature`.

        Raises:
            DataError: there are no held-out prompts.
        """
        stack, settings, begin = self._running, self.config.evaluation, time.perf_counter()
        held_out = self._prompting.held_out
        if held_out is None:
            raise DataError(
                "There are no held-out prompts.",
                fix="set data.eval_source, or pass eval_data= to RLSession.start.",
            )
        count = n_samples_per_prompt or settings.n_samples_per_prompt
        heat = settings.temperature if temperature is None else temperature
        rows = held_out.rows[: settings.max_prompts]
        seed = f"{self.config.seed} evaluation"
        rollout = self._prompting.generate(stack, rows, count, heat, seed, self.step_count)
        rollout = replace_samples(rollout, score_samples(rollout.samples, self._reward))
        right = [
            sum((s.reward or 0.0) >= 1.0 for s in group)
            for group in rollout.groups()
            if all(s.reward is not None for s in group)
        ]
        report = EvalReport(
            dataset=held_out.name,
            accuracy=rollout.mean_reward(),
            prompts=len(rows),
            n_samples_per_prompt=count,
            temperature=heat,
            pass_at_k={
                k: sum(pass_at_k(n, count, k) for n in right) / len(right)
                for k in (1, 2, 4, 8, 16, 32, 64)
                if k <= count and right
            },
            rollout=rollout,
            step=self.step_count,
            seconds=time.perf_counter() - begin,
            left_out=len(rollout.failed()),
        )
        if self._recorder:
            self._recorder.evaluation(report)
        return report

    # ---- keeping -------------------------------------------------------------------------------

    def save(self, path: str | Path | None = None) -> Path:
        """Write a checkpoint: weights, optimizer, data position, counters, metrics, configuration.

        Args:
            path: a new directory; None takes the run's own folder, else `checkpoints/`.

        Raises:
            CheckpointError: it cannot be written, or something else is in the way.
        """
        return checkpoint.save(self, self._running, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
    ) -> Self:
        """Start a session that continues where `save` was called.

        Args:
            path: a directory that `save` wrote.
            data: as in `start`; rows and functions that were passed there are not in the
                checkpoint.
            eval_data: as in `start`.
            reward: as in `start`.

        Raises:
            CheckpointError: it cannot be read. Never continues from other weights in silence.
        """
        folder = Path(path)
        config, state = checkpoint.read(folder)
        session = cls.start(config, data=data, eval_data=eval_data, reward=reward)
        try:
            checkpoint.restore(session, session._running, folder, state)
        except BaseException:
            session.close()
            raise
        return session

    def __repr__(self) -> str:
        return (
            f"RLSession({self.config.name!r}, {self._state}, model {self.config.model.name}, "
            f"step {self.step_count}, engine holds weights {self.engine_version})"
        )


def replace_samples(rollout: Rollout, samples: Sequence[Any]) -> Rollout:
    """The same rollout with other samples."""
    return Rollout(samples, rollout.step, rollout.seconds)


def _due(step: int, interval: int) -> bool:
    return bool(interval) and step % interval == 0
