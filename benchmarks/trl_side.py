"""TRL's half of a comparison: GRPOTrainer in a process of its own, one iteration at a time.

The trainer runs its own loop, unchanged; a callback holds it between two steps until the other
side says "step", so it sleeps while the kit is measured.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from kit.config import SessionConfig
from kit.rewards import grade

NO_SUCH_TOKEN = 1 << 20
"""An end-of-sequence token that no model ever writes."""


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration took, and what it did."""

    seconds: float
    generate_seconds: float
    tokens: int
    """Response tokens generated."""
    prompts: tuple[str, ...]
    """What was asked, to check that both sides are asked the same."""
    reward: float


def serve(
    channel: Connection,
    config: SessionConfig,
    rows: list[dict[str, Any]],
    full: bool,
    steps: int,
    changes: dict[str, Any] | None = None,
) -> None:
    """Build the trainer, send "ready", then answer each "step" with an `Iteration`.

    Args:
        channel: to the process that measures.
        config: the kit's settings, which TRL's are made from.
        rows: prompts and labels, in the order they are asked in.
        full: go on after the end-of-sequence token.
        steps: how many iterations there will be.
        changes: of `GRPOConfig`, beside what `arguments` sets.
    """
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOTrainer

    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    conversations = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "label": row["label"]}
        for row in rows
    ]
    record = Record()

    class HeldTrainer(GRPOTrainer):  # type: ignore[misc]
        """GRPOTrainer, with the time of its generation noted."""

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            answer = super()._generate_single_turn(*args, **kwargs)
            record.generate_seconds = time.perf_counter() - begin
            return answer

    class Hold(transformers.TrainerCallback):  # type: ignore[misc]
        """Report the iteration that ended, and wait for the next "step"."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the optimizer's last kernels belong to the iteration
            channel.send("ready" if record.begin is None else record.iteration())
            if channel.recv() != "step":
                raise SystemExit
            record.begin = time.perf_counter()

    with tempfile.TemporaryDirectory() as directory:
        trainer = HeldTrainer(
            model=config.model.name,
            reward_funcs=record.rewards,
            args=arguments(config, directory, full, steps, changes or {}),
            train_dataset=Dataset.from_list(conversations),
            callbacks=[Hold()],
        )
        if full:
            trainer.eos_token_ids = [NO_SUCH_TOKEN]
        trainer.train()


def arguments(
    config: SessionConfig, directory: str, full: bool, steps: int, changes: dict[str, Any]
) -> Any:
    """TRL's settings, equal to the kit's where both have one, else whatever is fastest."""
    from trl import GRPOConfig

    training, rollout = config.training, config.rollout
    settings: dict[str, Any] = dict(
        output_dir=directory,
        # The same work.
        num_generations=training.n_samples_per_prompt,
        per_device_train_batch_size=config.training.rollout_size,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=1,
        max_steps=steps,
        max_completion_length=rollout.max_response_len,
        temperature=rollout.temperature,
        generation_kwargs={"eos_token_id": NO_SUCH_TOKEN} if full else None,
        shuffle_dataset=False,
        # The same update.
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_eps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip_grad,
        epsilon=training.eps_clip,
        epsilon_high=training.eps_clip_high,
        beta=training.kl_loss_coef,
        loss_type="grpo",
        scale_rewards="group",
        # The same machine and precision, and nothing beside the work.
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return GRPOConfig(**settings | changes)


class Record:
    """What is noted while an iteration runs."""

    def __init__(self) -> None:
        self.begin: float | None = None
        self.generate_seconds = 0.0
        self._prompts: tuple[str, ...] = ()
        self._tokens = 0
        self._reward = 0.0

    def rewards(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        label: list[str],
        **_: Any,
    ) -> list[float]:
        """The reward function that TRL calls: the kit's own."""
        values = [
            grade("exact", completion[0]["content"], answer)
            for completion, answer in zip(completions, label, strict=True)
        ]
        self._prompts = tuple(prompt[0]["content"] for prompt in prompts)
        self._tokens = sum(len(ids) for ids in completion_ids)
        self._reward = sum(values) / len(values)
        return values

    def iteration(self) -> Iteration:
        """The iteration that has just ended."""
        assert self.begin is not None
        seconds = time.perf_counter() - self.begin
        return Iteration(seconds, self.generate_seconds, self._tokens, self._prompts, self._reward)
