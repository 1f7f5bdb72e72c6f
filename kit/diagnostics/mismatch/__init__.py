"""Do trainer and engine give the same log-probabilities to a rollout's tokens, and if not, why?

    compare.py   both sides' numbers, token by token, and the verdict
    curves.py    quantiles, curves, ratios
    lab.py       the samples under suspicion, and experiments with engine and trainer
    probes.py    one experiment for each cause: what was looked at, what was found
    causes.py    which probes run in which order, and the words for what they find

A check that passes costs one pass of the trainer. The probes run when it does not, or when asked.
"""

from kit.diagnostics.mismatch.check import THRESHOLDS, WORST, check, comparable, compare

__all__ = ["THRESHOLDS", "WORST", "check", "comparable", "compare"]
