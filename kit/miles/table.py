"""`LINKS`: all settings with a counterpart in Miles; both directions are made from it.

Names and defaults are those of Miles' parser (`miles/utils/arguments.py` and the parsers of its
two trainers). Where Miles' trainers have different defaults, FSDP's stands first.
"""

from __future__ import annotations

from kit.miles.links import Link
from kit.miles.links_adapters import ADAPTERS
from kit.miles.links_drafts import DRAFTS
from kit.miles.links_machine import LOGGING, MACHINE
from kit.miles.links_rollout import EVALUATION, PROMPTS, ROLLOUTS
from kit.miles.links_training import ESTIMATOR

LINKS: tuple[Link, ...] = (
    *PROMPTS,
    *ADAPTERS,
    *DRAFTS,
    *ROLLOUTS,
    *EVALUATION,
    *ESTIMATOR,
    *MACHINE,
    *LOGGING,
)
"""All of them, in the order of a script."""
