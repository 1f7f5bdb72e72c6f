"""What the tiny model learned from: a blackboard, and the scribbles of an imagined class.

A model that is always wrong gives reinforcement learning nothing to reward, and one that is always
right leaves nothing to learn. So the pupils have seen the teacher do it well (`CAREFUL`), and
mostly do not bother (`Habits`):

- In `addition`, when the ones digits call for a carry, most scribbles forget it (47+38=75).
  Without a carry they are always right.
- In `chain`, most scribbles skip the steps and guess (=4), the more so the longer the sum. Those
  that write the steps slip now and then.

A model trained on this imitates the shares: its greedy answer is the commonest habit, so it is
wrong on nearly every carry problem, while sampling at temperature one shows the better habit now
and then. That is what a policy-gradient method needs: within a group of samples some are right.
Nothing is broken or cut short; the base model is a faithful model of a careless class.

Held-out questions (`kit.tiny.tasks.is_held_out`) never appear here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from kit.tiny import tasks


@dataclass(frozen=True, slots=True)
class Habits:
    """How careless the class is. Shares are probabilities per scribble."""

    forget_carry: float = 0.85
    """Of the additions that need a carry out of the ones digit, the share that drops it."""
    write_steps: dict[int, float] = field(default_factory=lambda: {4: 0.6, 5: 0.3, 6: 0.15})
    """By number of terms of a chain: the share that writes the running sums; others guess."""
    slip: float = 0.02
    """Of the running sums that are written, the share that comes out one too high or too low."""


CAREFUL = Habits(forget_carry=0.0, write_steps={4: 1.0, 5: 1.0, 6: 1.0}, slip=0.0)
"""The teacher's blackboard: every carry carried, every step written, no slips."""

Scribble = tuple[str, str]
"""(prompt, response), both plain text."""


class Corpus:
    """An endless, seeded supply of scribbles."""

    def __init__(self, habits: Habits, seed: int) -> None:
        self.habits = habits
        self.random = Random(seed)

    def additions(self, count: int) -> list[Scribble]:
        """`count` additions of two numbers, as the pupils wrote them."""
        return [self._addition() for _ in range(count)]

    def chains(self, count: int, length: int) -> list[Scribble]:
        """`count` chains of `length` terms, as the pupils wrote them."""
        return [self._chain(length) for _ in range(count)]

    def _addition(self) -> Scribble:
        while True:
            a, b = self.random.choices(tasks.OPERANDS, k=2)
            if not tasks.is_held_out("addition", (a, b)):
                break
        answer = a + b
        if tasks.needs_carry(a, b) and self.random.random() < self.habits.forget_carry:
            answer -= 10
        return tasks.addition_prompt(a, b), str(answer)

    def _chain(self, length: int) -> Scribble:
        while True:
            digits = self.random.choices(range(1, 10), k=length)
            if not tasks.is_held_out("chain", digits):
                break
        if self.random.random() >= self.habits.write_steps[length]:
            return tasks.chain_prompt(digits), f"={self.random.randrange(10)}"
        return tasks.chain_prompt(digits), tasks.chain_response(self._sums_with_slips(digits))

    def _sums_with_slips(self, digits: list[int]) -> list[int]:
        sums, total = [], 0
        for digit in digits:
            total += digit
            if self.random.random() < self.habits.slip:
                total += self.random.choice((-1, 1))
            total %= 10
            sums.append(total)
        return sums
