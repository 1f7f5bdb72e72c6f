"""Collects the groups of a step: over-sampling, partial rollout, dynamic sampling.

    buffer ──┐                        ┌── finished ── score ── rewards differ ──► rollout
             ├─► draw ──► engine ─────┤                    └── all equal: dropped, draw again
    data ────┘                        └── rollout is full: aborted ──► buffer, or forgotten

`RolloutCollector` is what `RLSession` calls. Without over-sampling a round is one ordinary call of
the engine, and the same seed gives the same samples.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING, Protocol

from kit.config import SessionConfig
from kit.data.buffer import Group, RolloutBuffer, unfinished
from kit.data.stream import PromptStream
from kit.errors import SessionError, StackError
from kit.rewards import score_samples
from kit.rewards.runner import Scoring
from kit.rollout.sampler import PromptSampler, RolloutStream, as_rows
from kit.samples import NEW_TOKENS, Messages, Rollout, Sample, Status
from kit.stack.engines import Request
from kit.tracking.metrics import equal_rewards
from kit.utils.arguments import at_least_one
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.data.prompts import PromptRow
    from kit.messages import SamplingSettings
    from kit.rewards.signature import Reward
    from kit.stack.engines import RequestStream, Response
    from kit.stack.stack import Stack


class DrawState(Protocol):
    """State that drawing prompts reads and advances; `TrainState` is one."""

    config: SessionConfig
    step: int
    rollouts_drawn: int
    stream: PromptStream
    buffer: RolloutBuffer
    last_rollout: Rollout | None


@dataclass(slots=True)
class RolloutCollector:
    """Draws prompts, and has responses generated and scored.

    Whatever is written when an exception ends a call is the state's `last_rollout`.
    """

    state: DrawState
    sampler: PromptSampler
    stack: Stack

    def next_seed(self) -> str:
        """Seed of the next generation."""
        self.state.rollouts_drawn += 1
        return f"{self.state.config.seed} rollout {self.state.rollouts_drawn}"

    @contextmanager
    def undo_draw_on_interrupt(self) -> Iterator[None]:
        """Undo the draw of prompts and seeds if the block is interrupted.

        An interrupt then changes nothing of what a session does afterwards. They stay drawn where
        they led to an update, and with over-sampling, where what was begun waits in the buffer.
        """
        state = self.state
        place, drawn, step = state.stream.state(), state.rollouts_drawn, state.step
        try:
            yield
        except KeyboardInterrupt:
            if state.step == step and not state.config.rollout.over_sampling_batch_size:
                with held():
                    state.stream.load_state(place)
                    state.rollouts_drawn = drawn
            raise

    def generate(
        self,
        prompts: Sequence[str | Messages] | None = None,
        n_samples_per_prompt: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
    ) -> Rollout:
        """Generate responses to given prompts, or to the next ones of the data.

        None takes the configured value. A call without arguments over-samples where the settings
        ask for it.
        """
        given = prompts, n_samples_per_prompt, temperature, max_tokens, top_p
        plain = all(value is None for value in given)
        if plain and self.state.config.rollout.over_sampling_batch_size:
            return self.over_sample()
        with self.undo_draw_on_interrupt():
            return self.finish(self.begin(*given))

    def begin(
        self,
        prompts: Sequence[str | Messages] | None = None,
        n_samples_per_prompt: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
    ) -> RolloutStream:
        """Have responses written, as for `generate`; `finish` waits for them."""
        training = self.state.config.training
        if n_samples_per_prompt is not None:
            n_samples_per_prompt = at_least_one(n_samples_per_prompt, "n_samples_per_prompt")
        sampling = self.sampler.sampling(temperature, max_tokens, top_p)
        rows = as_rows(prompts) or self.state.stream.next(training.rollout_batch_size)
        count = n_samples_per_prompt or training.n_samples_per_prompt
        return self._begin(rows, count, sampling)

    def over_sample(self) -> Rollout:
        """Over-sample: return the first `rollout_batch_size` groups that finish."""
        return GroupSelection(self).over_sample()

    def collect(self, reward: Reward) -> Rollout:
        """Collect `rollout_batch_size` scored groups for a step, if they can be found.

        Raises:
            SessionError: dynamic sampling found no group whose rewards differ.
            RewardError: a function for all samples returned the wrong number of values.
        """
        settings, state = self.state.config.rollout, self.state
        with self.undo_draw_on_interrupt():
            if settings.dynamic_sampling:
                selection = GroupSelection(self, reward)
                by_rounds = not settings.over_sampling_batch_size
                rollout = selection.by_rounds(reward) if by_rounds else selection.over_sample()
            elif settings.over_sampling_batch_size:
                rollout = self.over_sample()
                rollout = rollout.with_samples(score_samples(rollout.samples, reward))
            else:
                rollout = self.generate_and_score(state.config.training.rollout_batch_size, reward)
        state.last_rollout = rollout
        return rollout

    def generate_and_score(self, count: int, reward: Reward, first_group: int = 0) -> Rollout:
        """Generate and score the next `count` prompts, scoring while others are generated.

        A response is scored in this thread, which would only wait, as soon as it is written; so a
        reward function of one sample is called in the order in which responses are finished. One of
        all samples is called when all are written. Meanwhile the prompts after these are tokenized.

        Args:
            count: how many prompts.
            reward: a function or a built-in's name.
            first_group: the number of the first group.
        """
        per_prompt = self.state.config.training.n_samples_per_prompt
        scoring = Scoring(reward)
        rows = self.state.stream.next(count)
        stream = self._begin(rows, per_prompt, self.sampler.sampling())
        return self.finish(stream, scoring, first_group, count)

    def _begin(
        self, rows: Sequence[PromptRow], per_prompt: int, sampling: SamplingSettings
    ) -> RolloutStream:
        step, seed = self.state.step, self.next_seed()
        return self.sampler.write(self.stack, rows, per_prompt, sampling, seed, step)

    def finish(
        self,
        stream: RolloutStream,
        scoring: Scoring | None = None,
        first_group: int = 0,
        coming: int = 0,
    ) -> Rollout:
        """Wait for the responses of a stream that has begun; the last rollout is what came.

        Args:
            stream: what `begin` returned.
            scoring: gets each response as soon as it is there.
            first_group: the number of the first group that is scored.
            coming: how many prompts come next, which are made tokens of meanwhile.
        """
        state = self.state
        try:
            with scoring or nullcontext(), stream:
                if scoring:
                    stream.renumber(first_group)
                    self.sampler.prepare(state.stream, coming)
                for places in stream:
                    if scoring:
                        for place in places:
                            scoring.add(place, stream.samples[place])
                if scoring:
                    scoring.finish()
        finally:
            with held():
                stream.rest()
                if scoring:
                    for place, scored in scoring.scored.items():
                        stream.samples[place] = scored.sample
                state.last_rollout = stream.rollout() or state.last_rollout
        return stream.rollout()


def further_prompts(missing: int, kept: int, judged: int, most: int) -> int:
    """Number of prompts to draw next, from the share that was kept so far."""
    return min(most, math.ceil(missing * judged / kept)) if kept else most


Place = tuple[int, int]
"""(a group's number, a sample's place in it)."""


class GroupSelection:
    """Selection of groups for one rollout: drawn, kept, dropped or put back.

    Args:
        collector: the session's, which draws prompts and seeds.
        reward: None keeps every finished group, and scores none.
    """

    def __init__(self, collector: RolloutCollector, reward: Reward | None = None) -> None:
        self.state, self.sampler, self.stack = collector.state, collector.sampler, collector.stack
        self.collector, self.reward = collector, reward
        self.settings, training = self.state.config.rollout, self.state.config.training
        self.wanted, self.per_prompt = training.rollout_batch_size, training.n_samples_per_prompt
        self.kept: dict[int, Group] = {}
        """By the number under which they were drawn; scored, where there is a reward."""
        self.pool: dict[int, Group] = {}
        """Everything drawn and not dropped, as the engine left it: it is not lost if a reward
        function or an interrupt ends this."""
        self.drawn = self.rounds = self.continued = self.aborted = self.new_tokens = 0
        self.dropped: Counter[float] = Counter()
        """Groups whose rewards are all equal, by that reward."""
        self.judged_rewards: list[float] = []
        self.seconds = 0.0

    @property
    def missing(self) -> int:
        """Number of groups that the rollout still lacks."""
        return self.wanted - len(self.kept)

    @property
    def judged(self) -> int:
        """Number of finished groups that were kept or dropped."""
        return len(self.kept) + self.dropped.total()

    @property
    def may_draw(self) -> bool:
        """Whether another round is allowed; one is enough where nothing is dropped."""
        most = self.settings.dynamic_sampling_max_rounds if self.reward is not None else 1
        return self.rounds < most

    # ---- the two ways --------------------------------------------------------------------------

    def by_rounds(self, reward: Reward) -> Rollout:
        """Round after round, each finished before it is judged."""
        while self.missing and self.may_draw:
            self.rounds += 1
            count = further_prompts(self.missing, len(self.kept), self.judged, self.wanted)
            rollout = self.collector.generate_and_score(count, reward, self.drawn)
            self.seconds += rollout.seconds
            self.new_tokens += rollout.new_tokens
            self._judge(self._numbered(map(tuple, rollout.groups())))
        return self._rollout()

    def over_sample(self) -> Rollout:
        """More than is needed at once; what is finished is judged while the rest is written."""
        stream = self.stack.open_stream(self.sampler.sampling(), "call", list[Request[Place]]())
        begin = time.perf_counter()
        try:
            while self.missing and (self.may_draw or stream.pending):
                if self.missing > stream.pending and self.may_draw:
                    self._send(stream)
                else:
                    self._judge(self._scored(self._written(stream.take())))
            self._stop(stream)
            self.seconds = time.perf_counter() - begin
            rollout = self._rollout()
        except BaseException:
            with held():
                try:
                    with suppress(StackError):
                        self._stop(stream)
                finally:
                    self.state.last_rollout = self._written_so_far() or self.state.last_rollout
                    self._put_back()
            raise
        with held():
            self.state.last_rollout = rollout
            for number in self.kept:
                del self.pool[number]
            self._put_back()
        return rollout

    # ---- their parts ---------------------------------------------------------------------------

    def _stop(self, stream: RequestStream[Place]) -> None:
        """Abort what is not finished, and keep its beginnings."""
        stream.stop()
        for part in stream:
            self._written(part)

    def _send(self, stream: RequestStream[Place]) -> None:
        """Draw prompts, what waits in the buffer first, and give the engines what is unfinished."""
        state, sampler = self.state, self.sampler
        self.rounds += 1
        draw = random.Random(self.collector.next_seed())
        most = self.settings.over_sampling_batch_size or self.wanted
        waiting = self.settings.partial_rollout * len(state.buffer)
        with held():  # what has left the buffer is in the pool, from where it can go back
            groups = self._numbered(
                map(self.reset_if_masked, state.buffer.take(min(most, waiting)))
            )
        self._judge(self._scored([g for g in groups if not any(map(unfinished, g))]))
        if not self.missing:
            return
        with held():
            rows = state.stream.next(most - len(groups))
            groups += self._numbered(sampler.pending(rows, self.per_prompt, sampler.sampling()))
        for group in groups:
            number, requests = group[0].group_index, []
            for place, sample in enumerate(group):
                if unfinished(sample):
                    self.continued += sample.response_length > 0
                    budget = max(sampler.max_response_len - sample.response_length, 1)
                    seed = draw.getrandbits(31)
                    requests.append(Request((number, place), sample.tokens, seed, budget))
            if requests:
                stream.ask(requests, engine=number)
        sampler.prepare(state.stream, most)

    def reset_if_masked(self, group: Group) -> Group:
        """The group; without its responses where the mask would leave nothing to train on."""
        version = self.stack.weights.engine_version
        if (
            self.settings.mask_offpolicy_in_partial_rollout
            and not any(map(unfinished, group))
            and not any(any(sample.masked_to(version).mask) for sample in group)
        ):
            return tuple(sample.reset_response() for sample in group)
        return group

    def _numbered(self, groups: Iterable[Group]) -> list[Group]:
        """Renumber groups within this selection, and add them to its pool."""
        numbered = []
        for group in groups:
            numbered.append(tuple(replace(s, group_index=self.drawn) for s in group))
            self.pool[self.drawn] = numbered[-1]
            self.drawn += 1
        return numbered

    def _written(self, part: Sequence[Response[Place]]) -> list[Group]:
        """Write the engine's answers into their groups; return those that are finished."""
        whole = []
        for number, responses in groupby(part, key=lambda response: response[0][0]):
            written = list(self.pool[number])
            for (_, place), generation in responses:
                self.new_tokens += len(generation.tokens)
                self.aborted += generation.finish == "abort"
                written[place] = self.sampler.apply_generation(written[place], generation)
            group = self.pool[number] = tuple(written)
            if not any(map(unfinished, group)):
                whole.append(group)
        return whole

    def _scored(self, groups: list[Group]) -> list[Group]:
        if self.reward is None or not groups:
            return groups
        scored = iter(score_samples([s for group in groups for s in group], self.reward))
        return [tuple(islice(scored, len(group))) for group in groups]

    def _judge(self, groups: Sequence[Group]) -> None:
        """Drop scored groups whose rewards are equal, and keep as many as are missing."""
        for group in groups:
            self.judged_rewards += [s.reward for s in group if s.reward is not None]
            number = group[0].group_index
            if self.reward is not None and equal_rewards(group):
                self.dropped[round(float(group[0].reward or 0.0), 4)] += 1
                del self.pool[number]
            elif self.missing:
                self.kept[number] = group

    def _written_so_far(self) -> Rollout:
        """Rollout of everything generated so far."""
        groups = [self.kept.get(number, self.pool[number]) for number in sorted(self.pool)]
        begun = (s for group in groups for s in group if s.status is not Status.PENDING)
        return Rollout(begun, self.state.step, self.seconds)

    def _put_back(self) -> None:
        """Put unused groups into the buffer, if they are to be continued."""
        if self.settings.partial_rollout:
            self.state.buffer.put(self.pool[number] for number in sorted(self.pool))
        self.pool.clear()

    # ---- the result ----------------------------------------------------------------------------

    def _rollout(self) -> Rollout:
        """The kept groups, in the order in which they were drawn, as one rollout.

        Raises:
            SessionError: there are none.
        """
        notes = self._notes()
        if not self.kept:
            raise SessionError(f"There is nothing to train on: {notes[0]}")
        version = self.stack.weights.engine_version
        samples: list[Sample] = []
        for place, number in enumerate(sorted(self.kept)):
            for sample in self.kept[number]:
                if self.settings.mask_offpolicy_in_partial_rollout:
                    sample = sample.masked_to(version)
                samples.append(replace(sample, group_index=place, index=len(samples)))
        notes += self.sampler.reader.notes(samples)
        return Rollout(
            samples, self.state.step, self.seconds, self._metrics(samples, version), notes
        )

    def _notes(self) -> tuple[str, ...]:
        if not self.missing:
            return ()
        got = f"{len(self.kept)} of {self.wanted} groups."
        if self.reward is None:
            return (f"{got} The others were aborted before they were finished.",)
        return (
            f"{got} In {self.rounds} rounds of dynamic sampling {self.dropped.total()} of "
            f"{self.judged} groups had equal rewards. What to do: raise "
            "rollout.dynamic_sampling_max_rounds, or give prompts that the model solves sometimes: "
            "not always, not never.",
        )

    def _metrics(self, samples: Sequence[Sample], version: int) -> dict[str, float]:
        spans = [span for sample in samples for span in sample.spans]
        metrics: dict[str, float] = {NEW_TOKENS: self.new_tokens, "rollout/aborted": self.aborted}
        if self.settings.partial_rollout:
            tokens = sum(length for _, length in spans)
            old = sum(length for wrote, length in spans if wrote != version)
            metrics |= {
                "rollout/partial/continued": self.continued,
                "rollout/partial/off_policy_frac": old / tokens if tokens else 0.0,
                "rollout/partial/buffered_groups": len(self.pool) - len(self.kept),
            }
        if self.reward is not None:
            metrics |= {
                "rollout/dynamic_sampling/rounds": self.rounds,
                "rollout/dynamic_sampling/dropped_groups": self.dropped.total(),
                "rollout/dynamic_sampling/missing_groups": self.missing,
                "rollout/dynamic_sampling/raw_reward": sum(self.judged_rewards)
                / max(len(self.judged_rewards), 1),
            }
            for reward, groups in sorted(self.dropped.items()):
                metrics[f"rollout/zero_std/count_{reward:g}"] = groups
        return {name: float(value) for name, value in metrics.items()}
