"""`PromptSampler`: turns rows of data into samples, with tokenizer and engine.

`RolloutStream`: the samples of one rollout while the engine writes them.

    engine    │ writes ........................................ │ sleeps
    notebook  │ next prompts to tokens │ tokens to text, rewards │ what came last

What the notebook's process has to do with a response it does while others are being written, in
the thread that waits for them anyway.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kit.config import SessionConfig
from kit.data import load_prompts
from kit.data.buffer import Group
from kit.data.chat_template import check_fits, render
from kit.data.prompts import PromptRow, PromptSet
from kit.data.stream import PromptStream
from kit.errors import DataError, ModelError, SessionError, StackError
from kit.memory.sizes import response_limit
from kit.models.source import ModelSource
from kit.samples import Messages, Rollout, Sample, Status
from kit.utils.imports import without_garbage_collection
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.messages import Generation, SamplingSettings
    from kit.stack.engines import RequestStream
    from kit.stack.stack import Stack


LONGEST = 32
"""So many of the prompts with the most characters are measured in tokens before training."""

RENDERED = 4096
"""So many prompts are kept as tokens; those to evaluate on, and of small data all, come again."""
SHORT = 0.5
"""Seconds. Where responses take longer, handing them over in parts costs nothing that could be
measured; with less, some milliseconds, and little of the scoring would fall into them."""
MANY = 1024
"""Responses. What SGLang does to hand over one of them grows with their number: 0.2 ms here."""
STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


@dataclass(slots=True)
class PromptSampler:
    """Prompts of a session, and how they become samples."""

    config: SessionConfig
    model: ModelSource
    train: PromptSet
    held_out: PromptSet | None
    max_response_len: int
    tokenizer: Any = field(default=None)
    token_text: Callable[[int], str] = field(init=False)
    """One token as text; each is decoded once, as a rollout has a hundred thousand of them."""
    rendered: dict[str, list[int]] = field(default_factory=dict)
    """Token ids by prompt, the last `RENDERED` of them."""
    last_stream: RequestStream[int] | None = None
    """What the engine wrote last, for how long that took."""

    def __post_init__(self) -> None:
        self.token_text = cache(lambda token: str(self.tokenizer.decode([token])))

    @classmethod
    def load(cls, config: SessionConfig, model: ModelSource, data: Any, eval_data: Any) -> Self:
        """Read the prompts. Raises DataError, before anything is started."""
        name, seed = config.model.name, config.seed
        train = load_prompts(config.data, split="train", model_name=name, seed=seed, override=data)
        held_out = None
        if eval_data is not None or data is None or config.data.eval_source:
            held_out = load_prompts(
                config.data, split="eval", model_name=name, seed=seed, override=eval_data
            )
        return cls(config, model, train, held_out, response_limit(config, train, model))

    def load_tokenizer(self) -> None:
        """Load the tokenizer and measure the longest prompts. Raises ModelError or DataError."""
        try:
            with held():  # Transformers does not survive an import that is cut in two
                with without_garbage_collection():
                    from transformers import AutoTokenizer
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
                self.tokenize(row)

    def tokenize(self, row: PromptRow) -> list[int]:
        """Tokenize a prompt. Raises DataError if a response would not fit after it."""
        tokens = self.rendered.get(key := repr(row.prompt))
        if tokens is None:
            if len(self.rendered) >= RENDERED:
                del self.rendered[next(iter(self.rendered))]
            tokens = self.rendered[key] = render(
                row.prompt,
                self.tokenizer,
                apply_chat_template=self.config.data.apply_chat_template,
                system_prompt=self.config.data.system_prompt,
            )
        check_fits(tokens, self.model.context_length, self.max_response_len, row.number)
        return list(tokens)

    def prepare(self, stream: PromptStream, count: int) -> None:
        """Tokenize the next rows, while the engine works.

        A fault of one is raised when it is drawn.
        """
        with suppress(DataError):
            for row in stream.peek(count):
                self.tokenize(row)

    def write(
        self,
        stack: Stack,
        rows: Sequence[PromptRow],
        n_samples_per_prompt: int,
        sampling: SamplingSettings,
        seed: str,
        step: int,
    ) -> RolloutStream:
        """Start generating `n_samples_per_prompt` responses to each row; returns them as a stream.

        They are handed over all at once where the last ones took less than `SHORT` seconds, as the
        messages would cost more than there is to gain, and where they are more than `MANY`.
        """
        groups = self.pending(rows, n_samples_per_prompt)
        samples = [sample for group in groups for sample in group]
        draw = random.Random(seed)
        seeds = [draw.getrandbits(31) for _ in samples]
        short = self.last_stream is not None and self.last_stream.seconds < SHORT
        self.last_stream = stack.generate(
            [s.tokens for s in samples],
            sampling,
            seeds,
            at_once=short or len(samples) > MANY,
        )
        return RolloutStream(self, samples, self.last_stream, step)

    def sampling(
        self,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
    ) -> SamplingSettings:
        """Sampling settings; None takes the configured value.

        Raises:
            SessionError: `max_tokens` is more than the session has room for.
        """
        from kit.messages import SamplingSettings

        settings, longest = self.config.rollout, self.max_response_len
        if max_tokens is not None and max_tokens > longest:
            raise SessionError(
                f"max_tokens is {max_tokens}, and a response of this session has {longest} tokens "
                "at most: memory and context are planned for that.",
                fix=f"give {longest} or less, or start with a larger rollout.max_response_len.",
            )
        return SamplingSettings(
            temperature=settings.temperature if temperature is None else temperature,
            max_new_tokens=longest if max_tokens is None else max_tokens,
            top_p=settings.top_p if top_p is None else top_p,
            top_k=settings.top_k,
            stop=settings.stop,
        )

    def pending(self, rows: Sequence[PromptRow], n_samples_per_prompt: int) -> list[Group]:
        """Samples without responses, a group for each row.

        Raises:
            DataError: a prompt and the longest response do not fit into the context.
        """
        groups = []
        for number, row in enumerate(rows):
            tokens = self.tokenize(row)
            first = number * n_samples_per_prompt
            groups.append(
                tuple(
                    Sample(
                        group_index=number,
                        index=index,
                        prompt=row.prompt,
                        tokens=tokens,
                        label=row.label,
                        metadata=row.metadata,
                    )
                    for index in range(first, first + n_samples_per_prompt)
                )
            )
        return groups

    def apply_generation(self, sample: Sample, generation: Generation) -> Sample:
        """Append a generation to the sample it continues."""
        kept, status = len(generation.tokens), STATUS[generation.finish]
        texts = [*map(self.token_text, generation.tokens)]
        before = sample.metadata.get("token_texts", []) if sample.response_length else []
        if before and (end := stop_over_seam(before, texts, self.config.rollout.stop)):
            kept, status = end, Status.COMPLETED
        longer = sample.continued(
            generation.tokens[:kept], generation.log_probs[:kept], generation.weight_version
        )
        if status is Status.ABORTED and longer.response_length >= self.max_response_len:
            status = Status.TRUNCATED
        return replace(
            longer,
            # An array: each number of a list would be looked at, one by one, in Python.
            response=self.tokenizer.decode(
                np.asarray(longer.response_tokens, dtype=np.int64), skip_special_tokens=True
            ),
            status=status,
            # Ids alone cannot be shown, and a sample has no tokenizer.
            metadata={**sample.metadata, "token_texts": [*before, *texts[:kept]]},
        )


def stop_over_seam(before: Sequence[str], after: Sequence[str], stops: Sequence[str]) -> int:
    """Number of tokens of a continuation to keep if a stop string began before it; else 0.

    The engine looks for stop strings in what it writes now, so it cannot see such a one.
    """
    if not stops:
        return 0
    longest = max(map(len, stops))
    text = "".join(before)[-longest:]
    seam = len(text)
    for count, token in enumerate(after, start=1):
        text += token
        if any(0 <= text.find(stop) < seam for stop in stops):
            return count
        if len(text) > seam + longest:
            break
    return 0


def as_rows(prompts: Sequence[str | Messages] | None) -> list[PromptRow]:
    """Convert prompts given to `generate` to rows. Raises DataError unless they are a list."""
    if prompts is None:
        return []
    if isinstance(prompts, str) or not prompts:
        raise DataError(
            f"generate needs a list of prompts, got {prompts!r}.",
            fix="write session.generate(['12+34=']).",
        )
    unchecked: Sequence[Any] = prompts
    for number, prompt in enumerate(unchecked, start=1):
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


class RolloutStream:
    """Samples of a running rollout; iterate over it for those that have finished.

    An exception in its `with` stops the engine; what it has written is there after `rest()`.
    """

    def __init__(
        self,
        sampler: PromptSampler,
        samples: list[Sample],
        parts: RequestStream[int],
        step: int,
    ) -> None:
        self.samples = samples
        """All of them, in order; PENDING until they are written."""
        self._sampler, self._parts, self._step = sampler, parts, step
        self._answers: dict[int, Generation] = {}
        """By place; what is handed over and not a sample yet."""
        self._engine_failed = False

    def renumber(self, first_group: int) -> None:
        """Number the groups from `first_group`, before anything is generated."""
        self.samples = [replace(s, group_index=first_group + s.group_index) for s in self.samples]

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over the indices of samples that have finished since."""
        for part in self._parts:
            self._answers.update(part)
            self._write()
            yield [place for place, _ in part]

    def _write(self) -> None:
        for place, answer in self._answers.items():
            if self.samples[place].status is Status.PENDING:  # else an interrupt came in between
                self.samples[place] = self._sampler.apply_generation(self.samples[place], answer)
        self._answers.clear()

    def complete(self) -> Rollout:
        """Wait for every response, and return them all."""
        with self:
            for _ in self:
                pass
        return self.rollout()

    def rest(self) -> None:
        """Wait for what is left, such as the partial responses after an abort."""
        with held():
            with suppress(StackError):
                for part in () if self._engine_failed else self._parts:
                    self._answers.update(part)
            self._write()

    def rollout(self) -> Rollout:
        """Rollout of all finished samples: every one, unless interrupted."""
        written = (s for s in self.samples if s.status is not Status.PENDING)
        return Rollout(written, self._step, self._parts.seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._engine_failed = isinstance(error, StackError)
        if error and not self._engine_failed:
            with held(), suppress(StackError):  # the first error is the one to raise
                self._parts.stop()
