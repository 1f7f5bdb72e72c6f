"""What a generation is: `Sample`, one response; `Rollout`, all responses of one step; `Batch`.

    sample.py         Sample and Status, and what makes a sample impossible
    fields.py         the types of its fields, checked where one is read from a file
    rollout.py        Rollout, and the Batch that an update trains on
    experts.py        RoutedExperts, where a mixture of experts sent each token
    token_values.py   what is known of each token: log-probs, advantage, ratio, ...
    serialization.py  rollouts and batches as files: JSON lines, arrays, tables

Field names are those of Miles, so that a saved rollout reads the same in both.
"""

from __future__ import annotations

from kit.samples.rollout import NEW_TOKENS, Batch, Rollout
from kit.samples.sample import Messages, Sample, Status

__all__ = ["NEW_TOKENS", "Batch", "Messages", "Rollout", "Sample", "Status"]
