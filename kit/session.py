"""`RLSession`: the object that notebooks drive. Verbs only.

    session = RLSession.start("tiny")
    rollout = session.generate()
    rollout = session.score(rollout)
    batch   = session.advantages(rollout)
    report  = session.update(batch)
    session.sync()

`step()` is those five in order; `train(n)` is a loop of `step()`. Each verb returns a frozen
result that shows itself. `collect()` is the first two in one, and repeats them where `rollout` in
the configuration asks for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args, overload

from kit.config.training import Estimator
from kit.diagnostics import annotate, mismatch
from kit.diagnostics.annotate import Annotated
from kit.diagnostics.reward_trial import try_reward
from kit.diagnostics.startup import check as healthy_start
from kit.errors import ConfigError, DataError, SessionError, did_you_mean
from kit.lifecycle import step, train_loop
from kit.lifecycle.keeping import Keeping
from kit.lifecycle.lock import verb
from kit.lifecycle.train_loop import Training
from kit.reports import (
    CheckReport,
    EvalReport,
    MismatchReport,
    RewardTrial,
    StepReport,
    SyncReport,
    TrainReport,
    UpdateReport,
)
from kit.reports.training import Until
from kit.rewards import score_samples
from kit.rollout import batch as rollout_batch
from kit.rollout import collector, evaluate
from kit.rollout.batch import make_batch
from kit.rollout.sampler import as_rows
from kit.samples import Batch, Messages, Rollout, Sample
from kit.stack.sync import sync as hand_over
from kit.utils import interrupts
from kit.utils.arguments import at_least_one, expect
from kit.utils.arguments import temperature as checked_temperature

if TYPE_CHECKING:
    from kit.memory import MemoryPlan
    from kit.rewards.runner import Reward


class RLSession(Keeping):
    """One model in training, with its engine, its trainer, its prompts and its reward."""

    @verb
    def generate(
        self,
        prompts: Sequence[str | Messages] | None = None,
        *,
        n_samples_per_prompt: int | None = None,
        temperature: float | None = None,
    ) -> Rollout:
        """Write responses: to the next prompts of the training data, or to these.

        With `rollout.over_sampling_batch_size`, a call without arguments sends so many prompts and
        returns the first `rollout_batch_size` groups that are finished.

        Args:
            prompts: prompts of your own, instead of the next `rollout_batch_size` of the data.
            n_samples_per_prompt: responses to each; None takes the configured number.
            temperature: 0 is greedy; None takes the configured one.
        """
        _, training = self._running, self.config.training
        count = training.n_samples_per_prompt
        if n_samples_per_prompt is not None:
            count = at_least_one(n_samples_per_prompt, "n_samples_per_prompt")
        if temperature is not None:
            temperature = checked_temperature(temperature)
        own = not (prompts is None and n_samples_per_prompt is None and temperature is None)
        if self.config.rollout.over_sampling_batch_size and not own:
            self.last_rollout = collector.generate(self)
            return self.last_rollout
        with collector.drawing(self):
            rows = as_rows(prompts) or self._stream.next(training.rollout_batch_size)
            return collector.generate_only(self, rows, count, temperature)

    @verb
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
        scored = rollout.with_samples(score_samples(rollout.samples, chosen))
        self.last_rollout = scored
        return scored

    def try_reward(
        self, fn: Reward, rollout: Rollout | None = None, against: Reward | None = None
    ) -> RewardTrial:
        """What a reward would give, beside another one; nothing trains, nothing changes.

        Args:
            fn: a function or a built-in's name, as for `score`.
            rollout: None takes the last one.
            against: what to compare with; None takes the session's own reward.
        """
        fix = "generate one first (`session.generate()`), or pass `rollout=`."
        rollout = self.last_rollout if rollout is None else rollout
        rollout = expect(rollout, Rollout, "try_reward", fix)
        return try_reward(rollout, fn, self._reward if against is None else against)

    @verb
    def collect(self, reward: Reward | None = None) -> Rollout:
        """Generate and score what a step trains on; a response while others are being written.

        With `rollout.dynamic_sampling`, groups whose rewards are all equal are left out and
        further prompts drawn until `rollout_batch_size` groups are left.

        Args:
            reward: a function or a built-in's name, instead of the session's.

        Raises:
            SessionError: dynamic sampling found no group whose rewards differ.
        """
        _ = self._running
        with collector.drawing(self):
            rollout = collector.collect(self, self._reward if reward is None else reward)
        self.last_rollout = rollout
        return rollout

    @verb
    def advantages(self, rollout: Rollout, advantage_estimator: Estimator | None = None) -> Batch:
        """What an update will see: rewards made into advantages by the configured estimator.

        A group with a failed or aborted sample is left out whole: its mean would be of other
        samples than were drawn.

        Args:
            rollout: what `score` returned.
            advantage_estimator: another one than the configured, to compare. The update still
                takes the configured one's loss.

        Raises:
            SessionError: the rollout has no rewards yet.
        """
        fix = "pass what `session.score(...)` returned."
        rollout = expect(rollout, Rollout, "advantages", fix)
        training = self.config.training
        if advantage_estimator is not None:
            if advantage_estimator not in (known := get_args(Estimator)):
                raise ConfigError(
                    f"There is no advantage_estimator {advantage_estimator!r}.",
                    fix=did_you_mean(advantage_estimator, known),
                )
            # Settings of other estimators do no harm here, so they are not checked again.
            training = training.model_copy(update={"advantage_estimator": advantage_estimator})
        return make_batch(rollout, training, self.log_probs)

    @verb
    def log_probs(self, samples: Sequence[Sample], of: str = "policy") -> list[list[float]]:
        """What the trainer says of each response token, one list a sample.

        Args:
            samples: a rollout, or some of its samples.
            of: log-probs, in nats, of the `policy` or the `reference`; or the critic's `values`.

        Raises:
            StackError: there is no reference or no critic.
        """
        if of not in (known := ("policy", "reference", "values")):
            raise SessionError(f"log_probs knows no {of!r}.", fix=did_you_mean(of, known))
        return self._running.by_token(
            [s.tokens for s in samples], [s.response_length for s in samples], of
        )

    @verb
    def annotate(self, what: Annotated) -> Annotated:
        """The same with what the present weights say of each response token: see `Sample.strip`.

        Log-probs and entropies; in a batch also advantages and each token's share of the loss.
        After an update, the log-probs of the annotation before are kept beside the new ones.

        Args:
            what: a rollout, a batch, or one sample.
        """
        text = self._prompting.token_text
        return annotate.annotate(self._running, what, self.weight_version, text)

    @verb
    def update(self, batch: Batch) -> UpdateReport:
        """Train on a batch. The same batch again, by a cell run twice, changes nothing.

        Raises:
            StackError: loss or gradient is not finite; the weights are as before.
        """
        fix = "pass a batch: `session.update(session.advantages(rollout))`."
        batch = expect(batch, Batch, "update", fix)
        with interrupts.held() as interrupted:
            self.last_batch = batch
            self._journal.before_update(self, batch)
            report = rollout_batch.update(self._running, batch, self.step_count)
            self.step_count += report.applied
            interrupted.said = f"The update was made before it could stop: step {self.step_count}."
        return report

    @verb
    def sync(self, *, exact: bool = False, verify: bool = False) -> SyncReport:
        """Hand the trainer's weights to the engine, which forgets all it cached of old ones.

        Args:
            exact: without what `engine.weight_bits` and `engine.weight_noise` do to them, until
                the next sync; to evaluate the weights themselves.
            verify: compare a checksum of each parameter on both sides afterwards.

        Raises:
            StackError: with `verify`, a parameter did not arrive.
        """
        return hand_over(self._running, self.weight_version, exact=exact, verify=verify)

    @verb
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
            # A count of its own makes it one plain call, which continues nothing.
            count = self.config.training.n_samples_per_prompt
            if not (last and fresh and mismatch.comparable(last)):
                last = self.generate(n_samples_per_prompt=count)
            rollout = last
        rollout = expect(rollout, Rollout, "check_mismatch", "pass a rollout, or nothing.")
        if not (samples := mismatch.comparable(rollout)):
            raise DataError("The rollout has no tokens with log-probs to compare.")
        return mismatch.check(
            samples,
            config=self.config,
            stack=stack,
            prompting=self._prompting,
            trainer_version=self.weight_version,
            engine_version=self.engine_version,
            deep=deep,
        )

    @verb
    def check(self) -> CheckReport:
        """The invariants of a healthy start: one by one, with value and bound.

        A few responses are written and an update is tried at learning rate 0. The session is as it
        was afterwards: weights, optimizer, counters, randomness, place in the data.
        """
        return healthy_start(self, self._running)

    def memory_plan(self) -> MemoryPlan:
        """What holds the device when, beside what was seen so far, and why."""
        stack = self._running
        return stack.plan.with_measured(stack.measured)

    @verb
    def step(self) -> StepReport:
        """One whole step: collect (generate and score), advantages, update, sync."""
        begin, index, config = time.perf_counter(), self.step_count, self.config
        if self.engine_version != self.weight_version:
            self.sync()  # after an update by hand: train only on what the present weights write
        with collector.drawing(self):
            rollout = self.collect()
            fresh = rollout.of_version(self.weight_version)  # without what older weights began
            due = len(fresh) and step.due(index, config.mismatch.interval)
            checked = self.check_mismatch(fresh) if due else None
            batch = self.advantages(rollout)
            with interrupts.held():  # or the weights would have a step that the history lacks
                update = self.update(batch)
                if not update.applied:
                    raise rollout_batch.nothing_to_train_on(update)
                done = step.hand_over(self, rollout, update, checked, begin)
        return step.finish(self, done)

    @overload
    def train(
        self, steps: int | None = ..., *, until: Until | None = ..., show: bool = ...
    ) -> TrainReport: ...
    @overload
    def train(
        self, steps: int | None = ..., *, until: Until | None = ..., dashboard: Literal[True]
    ) -> Training: ...
    def train(
        self,
        steps: int | None = None,
        *,
        until: Until | None = None,
        show: bool = True,
        dashboard: bool = False,
    ) -> TrainReport | Training:
        """A loop of `step()`, shown live. Interrupting it keeps the steps that are done.

        Args:
            steps: None takes the configured `num_rollout`.
            until: called after each step; True ends training.
            show: draw the progress while training.
            dashboard: train in the background, under curves, samples and buttons, and return a
                `Training` at once; its `wait()` gives the report. A batch run returns it finished.
        """
        if dashboard:
            return train_loop.train_on_dashboard(self, steps, until)
        return train_loop.train(self, steps, until, show)

    def dashboard(self, steps: int | None = None) -> Training:
        """The training under way; or the history so far, and buttons to begin so many steps."""
        return train_loop.dashboard(self, steps)

    @verb
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
        settings = self.config.evaluation
        count = settings.n_samples_per_prompt
        if n_samples_per_prompt is not None:
            count = at_least_one(n_samples_per_prompt, "n_samples_per_prompt")
        heat = settings.temperature if temperature is None else checked_temperature(temperature)
        report = evaluate.evaluate(self, self._running, count, heat)
        if self._recorder:
            self._recorder.evaluation(report)
        if self._loggers:
            self._loggers.evaluation(report)
        return report
