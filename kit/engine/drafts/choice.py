"""Whether an engine drafts, decided pass by pass from what passes take and give.

Where few requests are written at once, a pass of the model costs about as much for five tokens as
for one; where many are, it does not, and drafts that are wrong cost time. For requests at once in
powers of two, this measures passes of both kinds, takes the faster, and looks at the other again
now and then.

A pass without drafts is SGLang's pass that verifies drafts, with none; the draft reads what it
gives, so that it can go on at once.

Read from SGLang 0.5.16:
    speculative/adaptive_runtime_state.py   AdaptiveController, in whose place this stands
    speculative/eagle_worker_v2.py   EAGLEWorkerV2: activate_step_by_batch before each pass,
                                     on_verify_complete_cpu as its result is read, in the same
                                     order; build_adaptive_runtime_state, for no step
                                     _build_trivial_verify_input, which asks for hidden states
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TRIAL = 8
"""Passes by which one way is measured."""
SETTLE = 2
"""Passes after a change that are not measured: one of the other way may still run."""
MEASURE = SETTLE + TRIAL + 2
"""Passes of a way that is to be measured: the last results are read after the next have begun."""
AGAIN = 400
"""Passes after which the slower way is looked at again."""
IDLE = 0.05
"""Seconds between two passes from which on the engine had nothing to do."""
KEPT = 32
"""Latest passes that count."""


@dataclass(slots=True)
class Way:
    """What passes with drafts, or without, have taken and given."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Of a request."""
    fresh: int = 0
    """Passes since it was last to be measured anew."""

    def add(self, seconds: float, tokens: float) -> None:
        """Note a pass; the first one after `forget` stands for those of before."""
        if not self.fresh:
            self.seconds.clear()
            self.tokens.clear()
        self.fresh += 1
        self.seconds.append(seconds)
        self.tokens.append(tokens)

    def forget(self) -> None:
        """Have it measured anew; until then what there is stands."""
        self.fresh = 0

    @property
    def known(self) -> bool:
        """Whether it has been measured lately."""
        return self.fresh >= TRIAL

    @property
    def pass_seconds(self) -> float | None:
        """Seconds of a pass: the median, since some read prompts in between; None before any."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def rate(self) -> float:
        """Tokens of a request a second."""
        return statistics.fmean(self.tokens) / statistics.median(self.seconds)


class Pace:
    """The choice for about so many requests at once."""

    def __init__(self) -> None:
        """Nothing is known: it begins with drafts."""
        self.ways = {True: Way(), False: Way()}
        """By whether a pass drafts."""
        self._drafts, self._left = True, MEASURE

    def choose(self) -> bool:
        """Whether the next pass drafts."""
        if not self._left:
            self._think()
        self._left -= 1
        return self._drafts

    def _think(self) -> None:
        now, other = self.ways[self._drafts], self.ways[not self._drafts]
        if not now.known:
            self._left = TRIAL
        elif not other.known:
            self._drafts, self._left = not self._drafts, MEASURE
        else:
            self._drafts = self.ways[True].rate >= self.ways[False].rate
            self.ways[not self._drafts].forget()
            self._left = AGAIN


@dataclass(frozen=True, slots=True)
class Launched:
    """A pass that was begun."""

    drafts: bool
    requests: int
    settled: bool
    """Whether the passes before it drafted, or not, as it does."""


class Paces:
    """The choice for any number of requests, from passes as they begin and end."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._paces: dict[int, Pace] = {}
        self._running: deque[Launched] = deque()
        self._same = 0
        self._last: bool | None = None
        self._ended: float | None = None

    def begin(self, requests: int, now: float) -> bool:
        """Whether a pass that begins, for so many requests, drafts; `now` as for `end`."""
        if self._ended is not None and now - self._ended > IDLE:
            self._running.clear()  # an interrupt may have left some
            self._ended = None
        drafts = self._pace(requests).choose()
        self._same = self._same + 1 if drafts is self._last else 0
        self._last = drafts
        self._running.append(Launched(drafts, requests, self._same >= SETTLE))
        return drafts

    def end(self, requests: int, tokens: int, now: float) -> tuple[float, float]:
        """Note what a pass has given: its seconds, and those that one without drafts would take.

        Both are 0 where they are not known.

        Args:
            requests: of the pass.
            tokens: that it gave, of all requests.
            now: seconds of a clock.
        """
        began, self._ended = self._ended, now
        launched = self._running.popleft() if self._running else None
        if launched is None or launched.requests != requests:
            self._running.clear()
            return 0.0, 0.0
        if began is None or not launched.settled:
            return 0.0, 0.0
        pace, seconds = self._pace(requests), now - began
        pace.ways[launched.drafts].add(seconds, tokens / requests)
        plain = pace.ways[False].pass_seconds
        if plain is None:
            return 0.0, 0.0
        return seconds, plain * tokens / requests

    def _pace(self, requests: int) -> Pace:
        return self._paces.setdefault(requests.bit_length(), Pace())


# ---- in SGLang's scheduler ---------------------------------------------------------------------


class DraftChoice:
    """Has a worker of SGLang's draft where it pays; stands for its `AdaptiveController`."""

    def __init__(self, worker: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        """`worker` drafts with a model of its own, chains."""
        self._worker, self._clock, self._paces = worker, clock, Paces()
        self._states: dict[int, Any] = {}
        self._steps = int(worker.speculative_num_steps)
        self.last_pass = 0.0, 0.0
        """Seconds of the pass whose result is being read, and those that ones without drafts would
        take for the same tokens: the share of each of its requests; 0 where they are not known."""

    def register(self, state: Any, steps: int | None = None) -> None:
        """Take what the worker drafts with: its attention and its graphs."""
        self._states[state.speculative_num_steps] = state

    def init_states(self, cuda_graph_bs: Any = None) -> None:
        """Have the worker make what it takes to go without drafts."""
        self.register(self._worker.build_adaptive_runtime_state(0, 1, cuda_graph_bs=cuda_graph_bs))

    def activate_step_by_batch(self, batch_size: int) -> None:
        """Decide on the pass that begins."""
        drafts = self._paces.begin(batch_size, self._clock())
        state = self._states[self._steps if drafts else 0]
        worker, drafting = self._worker, self._worker.draft_worker
        if worker.speculative_num_steps == state.speculative_num_steps:
            return
        # Not by SGLang's own method, which tells the whole scheduler: it reserves room for each
        # pass by the number of drafted tokens before it is known whether the pass drafts.
        for each in (worker, drafting):
            each.speculative_num_steps = state.speculative_num_steps
            each.speculative_num_draft_tokens = state.speculative_num_draft_tokens
        target, draft = worker.target_worker.model_runner, drafting.draft_runner
        target.attn_backend = state.target_attn_backend
        target.decode_cuda_graph_runner = state.target_graph_runner
        draft.attn_backend = drafting.draft_extend_attn_backend = state.draft_extend_attn_backend
        drafting.cuda_graph_runner_for_draft_extend = state.cuda_graph_runner_for_draft_extend

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> None:
        """Note what a pass has given."""
        tokens = sum(num_correct_drafts_per_req) + batch_size
        seconds, without = self._paces.end(batch_size, tokens, self._clock())
        if self._worker.device == "cpu":
            self.last_pass = seconds / batch_size, without / batch_size
        # A GPU's passes without drafts take twice as long here as in an engine that never drafts.
        # The model's graph alone, timed there, takes about what plain decoding does, but as long as
        # the text was when it was last measured: a tenth to a half too much was estimated.


def without_drafts(build: Any) -> Any:
    """Have SGLang's passes without drafts ask for no hidden states, as its other passes do.

    Args:
        build: SGLang's `EAGLEWorkerV2._build_trivial_verify_input`.
    """

    def build_without_hidden(worker: Any, batch: Any) -> Any:
        info = build(worker, batch)
        info.capture_hidden_mode = None  # else its graphs would be captured anew
        return info

    return build_without_hidden


def register() -> None:
    """Have this process' SGLang draft where it pays."""
    from sglang.srt.speculative.standalone_worker_v2 import StandaloneWorkerV2

    worker: Any = StandaloneWorkerV2
    make = worker.__init__

    def make_with_choice(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.adaptive_controller = DraftChoice(self)

    worker.__init__ = make_with_choice
    worker._build_trivial_verify_input = without_drafts(worker._build_trivial_verify_input)
