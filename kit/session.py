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

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kit import checkpoint, health, mismatch
from kit.arguments import at_least_one, expect
from kit.arguments import temperature as checked_temperature
from kit.batching import grpo_batch
from kit.errors import DataError, SessionError
from kit.evaluation import summarize
from kit.lifecycle import Lifecycle
from kit.metrics import rollout_metrics
from kit.prompting import as_rows
from kit.reports import (
    CheckReport,
    EvalReport,
    MismatchReport,
    StepReport,
    SyncReport,
    TrainReport,
    UpdateReport,
)
from kit.rewards import score_samples
from kit.samples import Batch, Messages, Rollout

if TYPE_CHECKING:
    from kit.rewards.runner import Reward


class RLSession(Lifecycle):
    """One model in training, with its engine, its trainer, its prompts and its reward."""

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
        count = training.n_samples_per_prompt
        if n_samples_per_prompt is not None:
            count = at_least_one(n_samples_per_prompt, "n_samples_per_prompt")
        if temperature is not None:
            temperature = checked_temperature(temperature)
        rows = as_rows(prompts) or self._stream.next(training.rollout_batch_size)
        self._generations += 1
        rollout = self._prompting.generate(
            stack,
            rows,
            count,
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
        rollout = expect(rollout, Rollout, "score", "pass what `session.generate()` returned.")
        chosen = self._reward if reward is None else reward
        scored = replace_samples(rollout, score_samples(rollout.samples, chosen))
        self.last_rollout = scored
        return scored

    def advantages(self, rollout: Rollout) -> Batch:
        """What an update will see: each sample's reward against its group's (GRPO).

        A group with a failed or aborted sample is left out whole: its mean would be of other
        samples than were drawn.

        Raises:
            SessionError: the rollout has no rewards yet.
        """
        fix = "pass what `session.score(...)` returned."
        rollout = expect(rollout, Rollout, "advantages", fix)
        divide = self.config.training.grpo_std_normalization
        return grpo_batch(rollout, divide_by_std=divide)

    def update(self, batch: Batch) -> UpdateReport:
        """Train on a batch. The same batch again, by a cell run twice, changes nothing.

        Raises:
            StackError: loss or gradient is not finite; the weights are as before.
        """
        from kit.stack.trainer import TrainBatch

        fix = "pass a batch: `session.update(session.advantages(rollout))`."
        batch = expect(batch, Batch, "update", fix)
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

    def check_mismatch(
        self, rollout: Rollout | None = None, *, deep: bool = False
    ) -> MismatchReport:
        """Recompute a rollout's log-probs in the trainer and compare, token by token.

        Where they disagree, experiments with engine and trainer look for the cause.

        Args:
            rollout: None takes the last one, if the engine's present weights wrote it; else one is
                generated.
            deep: look for causes even where they agree.
        """
        stack = self._running
        if rollout is None:
            last = self.last_rollout
            fresh = last is not None and last.written_by({self.engine_version})
            rollout = last if last is not None and fresh else self.generate()
        rollout = expect(rollout, Rollout, "check_mismatch", "pass a rollout, or nothing.")
        samples = [s for s in rollout if s.response_length and s.rollout_log_probs]
        if not samples:
            raise DataError("The rollout has no tokens with log-probs to compare.")
        return mismatch.check(
            samples,
            config=self.config,
            stack=stack,
            prompting=self._prompting,
            trainer_version=self.step_count,
            engine_version=self.engine_version,
            deep=deep,
        )

    def check(self) -> CheckReport:
        """The invariants of a healthy start: one by one, with value and bound.

        A few responses are written and an update is tried at learning rate 0. The session is as it
        was afterwards: weights, optimizer, counters, randomness, place in the data.
        """
        return health.check(self, self._running)

    def step(self) -> StepReport:
        """One whole step: generate, score, advantages, update, sync."""
        begin, index, config = time.perf_counter(), self.step_count, self.config
        if self.engine_version != self.step_count:
            self.sync()  # after an update by hand: train only on what the present weights write
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

        total, begin = self.config.training.num_rollout, time.perf_counter()
        if steps is not None:
            total = at_least_one(steps, "steps")
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
        count = settings.n_samples_per_prompt
        if n_samples_per_prompt is not None:
            count = at_least_one(n_samples_per_prompt, "n_samples_per_prompt")
        heat = settings.temperature if temperature is None else checked_temperature(temperature)
        rows = held_out.rows[: settings.max_prompts]
        seed = f"{self.config.seed} evaluation"
        rollout = self._prompting.generate(stack, rows, count, heat, seed, self.step_count)
        rollout = replace_samples(rollout, score_samples(rollout.samples, self._reward))
        report = summarize(
            rollout,
            dataset=held_out.name,
            n_samples_per_prompt=count,
            temperature=heat,
            step=self.step_count,
            seconds=time.perf_counter() - begin,
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
