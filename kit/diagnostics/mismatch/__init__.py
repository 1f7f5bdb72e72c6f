"""Whether trainer and engine give the same log-probs to a rollout's tokens, and if not, why.

    check.py         both sides' numbers, token by token, the verdict, and which probes run
    curves.py        quantiles, curves, importance ratios
    experiments.py   the worst samples, and what engine and trainer compute of them again
    probes.py        one experiment for each cause: what was looked at, what was found

A check that passes costs one pass of the trainer. The probes run when it does not, or when asked.
"""

from kit.diagnostics.mismatch.check import THRESHOLDS, WORST, check, comparable, compare, still_fits

__all__ = ["THRESHOLDS", "WORST", "check", "comparable", "compare", "still_fits"]
