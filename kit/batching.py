"""From a scored rollout to the batch that an update trains on."""

from __future__ import annotations

from kit.errors import SessionError
from kit.rewards.runner import failure_summary
from kit.samples import Batch, Rollout, Sample, Status


def grpo_batch(rollout: Rollout, *, divide_by_std: bool) -> Batch:
    """Each sample with its reward against its group's.

    A group with a failed or aborted sample is left out whole: its mean would be of other samples
    than were drawn.

    Args:
        rollout: with rewards.
        divide_by_std: divide by the group's standard deviation.

    Raises:
        SessionError: a sample has no reward yet.
    """
    import torch

    from kit.algo.advantages import group_normalize

    samples: list[Sample] = []
    left_out: list[str] = []
    for group in rollout.groups():
        bad = [s for s in group if s.status in (Status.FAILED, Status.ABORTED)]
        if not bad and any(s.reward is None for s in group):
            raise SessionError(
                "The rollout has no rewards.", fix="call `rollout = session.score(rollout)`."
            )
        if bad:
            why = failure_summary(bad) or [f"{len(bad)} aborted"]
            left_out.append(f"group {group[0].group_index}: {'; '.join(why)}")
        else:
            samples += [s for s in group if s.response_length]
    advantage_N = group_normalize(
        torch.tensor([s.reward for s in samples], dtype=torch.float64),
        torch.tensor([s.group_index for s in samples], dtype=torch.int64),
        divide_by_std,
    )
    return Batch(tuple(samples), tuple(advantage_N.tolist()), rollout.step, tuple(left_out))
