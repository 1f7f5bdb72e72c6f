"""Whether an engine drafts, from passes whose times are given."""

from __future__ import annotations

import pytest

from kit.engine.drafts.choice import AGAIN, MEASURE, Paces


class Engine:
    """Passes of so many seconds and tokens; results are read one pass late, or at once."""

    def __init__(self, late: bool) -> None:
        self.paces, self.now, self.late = Paces(), 0.0, late
        self.waiting: list[tuple[int, int, float]] = []
        self.found: list[tuple[float, float]] = []

    def run(
        self, requests: int, passes: int, drafts: tuple[float, int], plain: tuple[float, int]
    ) -> list[bool]:
        """Whether each pass drafted; what passes take, and give to a request."""
        chosen = []
        for _ in range(passes):
            chosen.append(self.paces.begin(requests, self.now))
            seconds, tokens = drafts if chosen[-1] else plain
            self.waiting.append((requests, tokens * requests, seconds))
            while len(self.waiting) > self.late:
                self.read()
        return chosen

    def read(self) -> None:
        requests, tokens, seconds = self.waiting.pop(0)
        self.now += seconds
        self.found.append(self.paces.end(requests, tokens, self.now))


@pytest.mark.parametrize("late", [False, True])
def test_each_number_of_requests_gets_the_faster_way(late: bool) -> None:
    engine = Engine(late)
    few = engine.run(4, 200, drafts=(0.003, 3), plain=(0.002, 1))
    assert few[:MEASURE] == [True] * MEASURE
    assert few[MEASURE : 2 * MEASURE] == [False] * MEASURE
    assert all(few[2 * MEASURE + 5 :])
    many = engine.run(200, 200, drafts=(0.010, 3), plain=(0.003, 1))
    assert not any(many[2 * MEASURE + 5 :])
    assert all(engine.run(5, 50, drafts=(0.003, 3), plain=(0.002, 1)))  # about four: it is known
    seconds, alone = engine.found[100]
    assert (seconds, alone) == pytest.approx((0.003, 0.006))


def test_the_slower_way_is_looked_at_again() -> None:
    engine = Engine(late=False)
    engine.run(4, 100, drafts=(0.003, 1), plain=(0.002, 1))
    # The draft has learned meanwhile.
    chosen = engine.run(4, AGAIN + 100, drafts=(0.003, 4), plain=(0.002, 1))
    assert not any(chosen[:100])
    assert all(chosen[-20:])


def test_time_in_which_nothing_ran_is_no_pass_s() -> None:
    engine = Engine(late=False)
    engine.run(4, 5, drafts=(0.003, 3), plain=(0.002, 1))
    engine.now += 100.0
    engine.run(4, 2 * MEASURE, drafts=(0.003, 3), plain=(0.002, 1))
    assert max(seconds for seconds, _ in engine.found) < 0.01


def test_an_interrupt_leaves_no_pass_to_be_taken_for_another() -> None:
    engine = Engine(late=True)
    engine.run(4, 2 * MEASURE, drafts=(0.003, 3), plain=(0.002, 1))
    engine.waiting.clear()  # its result is never read
    engine.now += 1.0
    begun = len(engine.found)
    engine.run(7, 20, drafts=(0.004, 3), plain=(0.004, 1))
    seconds, alone = zip(*engine.found[begun:], strict=True)
    assert set(seconds[:2]) == {0.0}  # after a rest a pass has nothing to be measured from
    assert max(seconds) < 0.01
    assert min(alone[2:]) > 0
