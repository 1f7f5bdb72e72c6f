"""Which groups of responses a step trains on: over-sampling, partial rollout, dynamic sampling.

    buffer ──┐                        ┌── finished ── score ── rewards differ ──► rollout
             ├─► draw ──► engine ─────┤                    └── all equal: dropped, draw again
    data ────┘                        └── rollout is full: aborted ──► buffer, or forgotten

`generate` and `collect` are what `RLSession` calls. Without over-sampling a round is one ordinary
call of the engine, and the same seed gives the same samples.

`Buffer`: groups of samples that wait to be continued; part of a session's checkpoint.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from kit.errors import DataError, SessionError, StackError
from kit.rewards import score_samples
from kit.rewards.runner import Scoring
from kit.samples import NEW_TOKENS, Rollout, Sample, Status
from kit.tracking.metrics import equal_rewards
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.data.prompts import PromptRow
    from kit.lifecycle.start import Lifecycle
    from kit.rewards.runner import Reward
    from kit.stack.engines import Finished, Underway


def generate_and_score(
    session: Lifecycle, count: int, reward: Reward, first_group: int = 0
) -> Rollout:
    """What `score(generate())` returns for the next `count` prompts, sooner.

    A response is scored in this thread, which would only wait, as soon as it is written; so a
    reward function of one sample is called in the order in which responses are finished. One of
    all samples is called when all are written. Meanwhile the prompts after these are tokenized.
    An exception stops the engine; what is written and scored by then is the `last_rollout`.

    Raises:
        RewardError: a function for all samples returned the wrong number of values.
    """
    scoring = Scoring(reward)
    prompting, per_prompt = session._prompting, session.config.training.n_samples_per_prompt
    rows, seed, step = session._stream.next(count), session._next_seed(), session.step_count
    writing = prompting.write(session._running, rows, per_prompt, None, seed, step)
    try:
        with scoring, writing:
            writing.renumber(first_group)
            prompting.prepare(session._stream, count)
            for places in writing:
                for place in places:
                    scoring.add(place, writing.samples[place])
            scoring.finish()
    finally:
        with held():
            writing.rest()
            for place, scored in scoring.scored.items():
                writing.samples[place] = scored.sample
            session.last_rollout = writing.rollout() or session.last_rollout
    return writing.rollout()


@contextmanager
def drawing(session: Lifecycle) -> Iterator[None]:
    """Prompts and randomness that an interrupted block has drawn are drawn again by the next one.

    Unless they led to an update. So an interrupt changes nothing of what a session does afterwards.
    Where more is sent than is needed, what was begun waits in the buffer instead, if `rollout` says
    so.

    Raises:
        SessionError: the session is not running.
    """
    _ = session._running
    place, generations = session._stream.state(), session._generations
    step = session.step_count
    try:
        yield
    except KeyboardInterrupt:
        if session.step_count == step and not session.config.rollout.over_sampling_batch_size:
            with held():
                session._stream.load_state(place)
                session._generations = generations
        raise


def generate_only(
    session: Lifecycle, rows: Sequence[PromptRow], per_prompt: int, temperature: float | None
) -> Rollout:
    """`per_prompt` responses to each row; those of an interrupted call are the `last_rollout`."""
    seed, step = session._next_seed(), session.step_count
    writing = session._prompting.write(session._running, rows, per_prompt, temperature, seed, step)
    try:
        with writing:
            for _ in writing:
                pass
    finally:
        with held():
            writing.rest()
            session.last_rollout = writing.rollout() or session.last_rollout
    return writing.rollout()


def generate(session: Lifecycle) -> Rollout:
    """The first `rollout_batch_size` groups that are finished, of all that were sent."""
    return Collection(session).over_sample()


def collect(session: Lifecycle, reward: Reward) -> Rollout:
    """What a step trains on: `rollout_batch_size` scored groups, if they can be found."""
    settings = session.config.rollout
    if settings.dynamic_sampling:
        collection = Collection(session, reward)
        if settings.over_sampling_batch_size:
            return collection.over_sample()
        return collection.by_rounds(reward)
    if settings.over_sampling_batch_size:
        session.last_rollout = rollout = generate(session)
        return rollout.with_samples(score_samples(rollout.samples, reward))
    return generate_and_score(session, session.config.training.rollout_batch_size, reward)


def further_prompts(missing: int, kept: int, judged: int, most: int) -> int:
    """How many prompts to draw next, if as large a share of them is kept as was so far."""
    return min(most, math.ceil(missing * judged / kept)) if kept else most


class Collection:
    """One rollout in the making."""

    def __init__(self, session: Lifecycle, reward: Reward | None = None) -> None:
        """Without a reward every finished group is kept, and none is scored."""
        self.session, self.reward = session, reward
        self.settings, training = session.config.rollout, session.config.training
        self.wanted, self.per_prompt = training.rollout_batch_size, training.n_samples_per_prompt
        self.kept: dict[int, Group] = {}
        """By the number under which they were drawn; scored, where there is a reward."""
        self.pool: dict[int, Group] = {}
        """Everything drawn and not dropped, as the engine left it: what is not lost if a reward
        function or an interrupt ends this."""
        self.drawn = self.rounds = self.continued = self.aborted = self.new_tokens = 0
        self.dropped: Counter[float] = Counter()
        """Groups whose rewards are all equal, by that reward."""
        self.judged_rewards: list[float] = []
        self.seconds = 0.0

    @property
    def missing(self) -> int:
        """Groups that the rollout still lacks."""
        return self.wanted - len(self.kept)

    @property
    def judged(self) -> int:
        """Finished groups that were looked at."""
        return len(self.kept) + self.dropped.total()

    @property
    def may_draw(self) -> bool:
        """Is another round allowed? Without a reward nothing is dropped, and one is enough."""
        most = self.settings.dynamic_sampling_max_rounds if self.reward is not None else 1
        return self.rounds < most

    # ---- the two ways --------------------------------------------------------------------------

    def by_rounds(self, reward: Reward) -> Rollout:
        """Round after round, each finished before it is judged."""
        while self.missing and self.may_draw:
            self.rounds += 1
            count = further_prompts(self.missing, len(self.kept), self.judged, self.wanted)
            rollout = generate_and_score(self.session, count, reward, self.drawn)
            self.seconds += rollout.seconds
            self.new_tokens += rollout.new_tokens
            self._judge(self._numbered(map(tuple, rollout.groups())))
        return self._rollout()

    def over_sample(self) -> Rollout:
        """More than is needed at once; what is finished is judged while the rest is written."""
        underway = self.session._running.underway(self.session._prompting.sampling())
        begin = time.perf_counter()
        try:
            while self.missing and (self.may_draw or underway):
                if self.missing > len(underway) and self.may_draw:
                    self._send(underway)
                else:
                    self._judge(self._scored(self._written(underway.finished())))
            self._written(underway.stop())
            self.seconds = time.perf_counter() - begin
            rollout = self._rollout()
        except BaseException:
            with held():
                try:
                    with suppress(StackError):
                        self._written(underway.stop())
                finally:
                    self.session.last_rollout = self._begun() or self.session.last_rollout
                    self._put_back()
            raise
        with held():
            self.session.last_rollout = rollout
            for number in self.kept:
                del self.pool[number]
            self._put_back()
        return rollout

    # ---- their parts ---------------------------------------------------------------------------

    def _send(self, underway: Underway) -> None:
        """Draw prompts, what waits in the buffer first, and give the engines what is unfinished."""
        session, prompting = self.session, self.session._prompting
        self.rounds += 1
        draw = random.Random(session._next_seed())
        most = self.settings.over_sampling_batch_size or self.wanted
        waiting = self.settings.partial_rollout * len(session._buffer)
        with held():  # what has left the buffer is in the pool, from where it can go back
            groups = self._numbered(map(self._worth, session._buffer.take(min(most, waiting))))
        self._judge(self._scored([g for g in groups if not any(map(unfinished, g))]))
        if not self.missing:
            return
        with held():
            rows = session._stream.next(most - len(groups))
            groups += self._numbered(prompting.pending(rows, self.per_prompt))
        for group in groups:
            todo = [sample for sample in group if unfinished(sample)]
            self.continued += sum(sample.response_length > 0 for sample in todo)
            if todo:
                underway.add(
                    group[0].group_index,
                    [s.tokens for s in todo],
                    [draw.getrandbits(31) for _ in todo],
                    [max(prompting.max_response_len - s.response_length, 1) for s in todo],
                )
        prompting.prepare(session._stream, most)

    def _worth(self, group: Group) -> Group:
        """The group; its prompt alone where the mask would leave nothing of it to train on."""
        version = self.session.engine_version
        if (
            self.settings.mask_offpolicy_in_partial_rollout
            and not any(map(unfinished, group))
            and not any(any(sample.masked_to(version).mask) for sample in group)
        ):
            return tuple(sample.unwritten() for sample in group)
        return group

    def _numbered(self, groups: Iterable[Group]) -> list[Group]:
        """The groups under numbers of this collection, and in its pool."""
        numbered = []
        for group in groups:
            numbered.append(tuple(replace(s, group_index=self.drawn) for s in group))
            self.pool[self.drawn] = numbered[-1]
            self.drawn += 1
        return numbered

    def _written(self, finished: Finished) -> list[Group]:
        """The groups with what the engine wrote; those that it finished are returned."""
        whole = []
        for number, generations in finished:
            answers = iter(generations)
            self.new_tokens += sum(len(generation.tokens) for generation in generations)
            self.aborted += sum(generation.finish == "abort" for generation in generations)
            group = tuple(
                self.session._prompting.written(s, next(answers)) if unfinished(s) else s
                for s in self.pool[number]
            )
            self.pool[number] = group
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

    def _begun(self) -> Rollout:
        """What is written of all groups that were drawn."""
        groups = [self.kept.get(number, self.pool[number]) for number in sorted(self.pool)]
        begun = (s for group in groups for s in group if s.status is not Status.PENDING)
        return Rollout(begun, self.session.step_count, self.seconds)

    def _put_back(self) -> None:
        """Let wait what was drawn and not used, where the settings want it continued."""
        if self.settings.partial_rollout:
            self.session._buffer.put(self.pool[number] for number in sorted(self.pool))
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
        version = self.session.engine_version
        samples: list[Sample] = []
        for place, number in enumerate(sorted(self.kept)):
            for sample in self.kept[number]:
                if self.settings.mask_offpolicy_in_partial_rollout:
                    sample = sample.masked_to(version)
                samples.append(replace(sample, group_index=place, index=len(samples)))
        return Rollout(
            samples, self.session.step_count, self.seconds, self._metrics(samples, version), notes
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


Group = tuple[Sample, ...]
"""The samples of one prompt, some finished and some not."""


def unfinished(sample: Sample) -> bool:
    """Does the engine have more to write?"""
    return sample.status in (Status.PENDING, Status.ABORTED)


class Buffer:
    """First in, first out. Nothing empties it but `take`."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        self._groups: deque[Group] = deque()
        self.put(groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        """Those that have waited longest first."""
        return iter(self._groups)

    def put(self, groups: Iterable[Group]) -> None:
        """Let groups wait behind those that wait already. One without samples is dropped."""
        self._groups.extend(group for group in groups if group)

    def take(self, most: int) -> list[Group]:
        """The groups that have waited longest, so many of them or all; they are gone from here."""
        return [self._groups.popleft() for _ in range(min(most, len(self._groups)))]

    def state(self) -> list[list[dict[str, Any]]]:
        """All groups, in JSON's types, as far as the metadata of the prompts is made of them."""
        return [[sample.to_dict() for sample in group] for group in self._groups]

    def load_state(self, state: Iterable[Iterable[Mapping[str, Any]]]) -> None:
        """Hold what `state` gave, and nothing else. Raises DataError for what is no such state;
        the buffer stays as it was then.
        """
        try:
            groups = [tuple(map(Sample.from_dict, group)) for group in state]
        except (TypeError, ValueError, DataError) as error:
            raise DataError(f"The saved buffer of unfinished groups is damaged: {error}.") from None
        self._groups.clear()
        self.put(groups)
