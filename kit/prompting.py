"""`Prompting`: from rows of data to samples, through the tokenizer and the engine."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kit.config import SessionConfig
from kit.data import load_prompts
from kit.data.prompts import PromptRow, PromptSet
from kit.data.templates import check_fits, render
from kit.errors import DataError, ModelError
from kit.model.source import ModelSource
from kit.samples import Messages, Rollout, Sample, Status

if TYPE_CHECKING:
    from kit.stack.engine import Generation
    from kit.stack.stack import Stack

LONGEST = 32
"""So many of the prompts with the most characters are measured in tokens before training."""
DEFAULT_RESPONSE_LENGTH = 1024
STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


@dataclass(slots=True)
class Prompting:
    """The prompts of a session and how they become samples."""

    config: SessionConfig
    model: ModelSource
    train: PromptSet
    held_out: PromptSet | None
    max_response_len: int
    tokenizer: Any = field(default=None)
    _texts: dict[int, str] = field(default_factory=dict)

    @classmethod
    def load(cls, config: SessionConfig, model: ModelSource, data: Any, eval_data: Any) -> Self:
        """Read the prompts. Raises DataError; nothing has been started then."""
        name, seed = config.model.name, config.seed
        train = load_prompts(config.data, split="train", model_name=name, seed=seed, override=data)
        held_out = None
        if eval_data is not None or data is None or config.data.eval_source:
            held_out = load_prompts(
                config.data, split="eval", model_name=name, seed=seed, override=eval_data
            )
        length = config.rollout.max_response_len or train.max_response_len
        default = min(DEFAULT_RESPONSE_LENGTH, model.context_length // 2)
        return cls(config, model, train, held_out, length or default)

    def load_tokenizer(self) -> None:
        """Load it, and measure the longest prompts. Raises ModelError or DataError."""
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                self.model.path,
                trust_remote_code=self.config.model.trust_remote_code,
                local_files_only=Path(self.model.path).is_dir(),
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"The tokenizer of {self.config.model.name!r} cannot be loaded.", why=str(error)
            ) from error
        for prompts in (self.train, self.held_out):
            # Rows that are generated one by one, as they are asked for, are measured then.
            known = prompts.rows if prompts and isinstance(prompts.rows, tuple) else ()
            rows = sorted(known, key=lambda row: -len(str(row.prompt)))
            for row in rows[:LONGEST]:
                self._tokens(row)

    def _tokens(self, row: PromptRow) -> list[int]:
        tokens = render(
            row.prompt,
            self.tokenizer,
            apply_chat_template=self.config.data.apply_chat_template,
            system_prompt=self.config.data.system_prompt,
        )
        check_fits(tokens, self.model.context_length, self.max_response_len, row.number)
        return tokens

    def generate(
        self,
        stack: Stack,
        rows: Sequence[PromptRow],
        n_samples_per_prompt: int,
        temperature: float | None,
        seed: str,
        step: int,
    ) -> Rollout:
        """`n_samples_per_prompt` responses to each row."""
        from kit.stack.engine import SamplingSettings

        settings = self.config.rollout
        sampling = SamplingSettings(
            temperature=settings.temperature if temperature is None else temperature,
            max_new_tokens=self.max_response_len,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop=settings.stop,
        )
        tokens = [self._tokens(row) for row in rows]
        prompts = [ids for ids in tokens for _ in range(n_samples_per_prompt)]
        draw = random.Random(seed)
        seeds = [draw.getrandbits(31) for _ in prompts]
        begin = time.perf_counter()
        generations = stack.generate(prompts, sampling, seeds)
        seconds = time.perf_counter() - begin
        samples = [
            self._sample(index, index // n_samples_per_prompt, rows, prompts[index], generation)
            for index, generation in enumerate(generations)
        ]
        return Rollout(samples, step, seconds)

    def _sample(
        self,
        index: int,
        group: int,
        rows: Sequence[PromptRow],
        prompt: list[int],
        generation: Generation,
    ) -> Sample:
        row = rows[group]
        return Sample(
            group_index=group,
            index=index,
            prompt=row.prompt,
            tokens=prompt + generation.tokens,
            response=self.tokenizer.decode(generation.tokens, skip_special_tokens=True),
            response_length=len(generation.tokens),
            label=row.label,
            status=STATUS[generation.finish],
            # Ids alone cannot be shown, and a sample has no tokenizer.
            metadata={**row.metadata, "token_texts": [*map(self.token_text, generation.tokens)]},
            rollout_log_probs=generation.log_probs,
            weight_versions=[generation.weight_version],
        )

    def token_text(self, token: int) -> str:
        """One token as text."""
        if token not in self._texts:
            self._texts[token] = str(self.tokenizer.decode([token]))
        return self._texts[token]


def as_rows(prompts: Sequence[str | Messages] | None) -> list[PromptRow]:
    """A person's own prompts as rows of data. Raises DataError for what is no list of prompts."""
    if prompts is None:
        return []
    if isinstance(prompts, str) or not prompts:
        raise DataError(
            f"generate needs a list of prompts, got {prompts!r}.",
            fix="write session.generate(['12+34=']).",
        )
    given: Sequence[Any] = prompts
    for number, prompt in enumerate(given, start=1):
        if isinstance(prompt, dict):
            raise DataError(
                f"Prompt {number} is one chat message, not a conversation.",
                fix="a conversation is a list of messages, and generate takes a list of prompts: "
                'write session.generate([[{"role": "user", "content": "..."}]]).',
            )
        if not isinstance(prompt, (str, list)):
            raise DataError(
                f"Prompt {number} is {prompt!r} ({type(prompt).__name__}).",
                fix="a prompt is a string, or a list of chat messages.",
            )
    return [
        PromptRow(prompt=prompt, label=None, metadata={}, number=number)
        for number, prompt in enumerate(prompts, start=1)
    ]
