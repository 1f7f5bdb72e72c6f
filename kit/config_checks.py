"""Which rollout policies go together; `kit.config` asks before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kit.config import RolloutConfig, TrainingConfig


def check_rollout_policies(rollout: RolloutConfig, training: TrainingConfig) -> None:
    """Raise ValueError for policies that would do nothing, or not what their names promise."""
    at_once, prompts = rollout.over_sampling_batch_size, training.rollout_batch_size
    if at_once is not None and at_once < prompts:
        raise ValueError(
            f"rollout.over_sampling_batch_size is {at_once}, fewer than the {prompts} prompts of "
            f"training.rollout_batch_size. What to do: give it more than {prompts}, or leave it "
            f"out."
        )
    surplus = at_once is not None and (at_once > prompts or rollout.dynamic_sampling)
    if rollout.partial_rollout and not surplus:
        raise ValueError(
            "rollout.partial_rollout continues what was aborted, and nothing is: "
            f"over_sampling_batch_size is {at_once}. What to do: set "
            f"rollout.over_sampling_batch_size above rollout_batch_size ({prompts}), such as "
            f"{2 * prompts}."
        )
    if rollout.mask_offpolicy_in_partial_rollout and not rollout.partial_rollout:
        raise ValueError(
            "rollout.mask_offpolicy_in_partial_rollout masks what older weights wrote, and without "
            "partial_rollout they write nothing. What to do: set rollout.partial_rollout: true, or "
            "leave the mask out."
        )
    if rollout.dynamic_sampling and training.n_samples_per_prompt == 1:
        raise ValueError(
            "rollout.dynamic_sampling compares the rewards of a group, and "
            "training.n_samples_per_prompt is 1. What to do: set it to 2 or more."
        )
