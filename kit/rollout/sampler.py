"""`PromptSampler`: turns rows of data into samples, with tokenizer and engine.

`RolloutStream`: the samples of one rollout while the engine writes them.

    engine    │ writes ........................................ │ sleeps
    notebook  │ next prompts to tokens │ tokens to text, rewards │ what came last

What the notebook's process has to do with a response it does while others are being written, in
the thread that waits for them anyway.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from kit.config import SHIPPED, SessionConfig
from kit.data import load_held_out, load_prompts
from kit.data.buffer import Group
from kit.data.chat_template import (
    check_fits,
    check_tokens,
    check_variables,
    opening,
    prefill,
    render,
)
from kit.data.conversations import check_prompt
from kit.data.prompt_check import look_at
from kit.data.prompts import PromptRow, PromptSet
from kit.data.stream import PromptStream
from kit.errors import DataError, ModelError, SessionError, StackError
from kit.memory.sizes import response_limit
from kit.models import own
from kit.models.source import ModelSource
from kit.reports.status import FirstPrompt
from kit.rollout.response import ResponseReader, stop_over_seam
from kit.rollout.template_check import check_template
from kit.samples import Messages, Rollout, Sample, Status
from kit.utils.arguments import at_least_one, share
from kit.utils.arguments import temperature as checked_temperature
from kit.utils.imports import without_garbage_collection
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.messages import Generation, SamplingSettings
    from kit.samples.experts import RoutedExperts
    from kit.stack.engines import RequestStream
    from kit.stack.stack import Stack


TRIED = 8
"""Prompts that a model's chat template is tried with before the session renders with it."""
MARGIN = 8
"""Tokens beyond what the text and the chat template's own words can have."""
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
    held_out: tuple[PromptSet, ...]
    max_response_len: int
    tokenizer: Any = field(default=None)
    reader: ResponseReader = field(init=False)
    """Turns response tokens into text; there once the tokenizer is loaded."""
    token_text: Callable[[int], str] = field(init=False)
    """One token as text; each is decoded once, as a rollout has a hundred thousand of them."""
    rendered: dict[str, list[int]] = field(default_factory=dict)
    """Token ids by prompt, the last `RENDERED` of them."""
    first_prompt: FirstPrompt | None = None
    """The first row of the data as tokens; there once the tokenizer is loaded."""
    last_stream: RequestStream[int] | None = None
    """What the engine wrote last, for how long that took."""

    def __post_init__(self) -> None:
        self.token_text = cache(lambda token: str(self.tokenizer.decode([token])))

    @classmethod
    def load(cls, config: SessionConfig, model: ModelSource, data: Any, eval_data: Any) -> Self:
        """Read the prompts. Raises DataError, before anything is started."""
        name, seed = config.model.name, config.seed
        train = load_prompts(config.data, split="train", model_name=name, seed=seed, override=data)
        held_out: tuple[PromptSet, ...] = ()
        if eval_data is not None or data is None or config.data.eval_source:
            held_out = load_held_out(config.data, model_name=name, seed=seed, override=eval_data)
        return cls(config, model, train, held_out, response_limit(config, train, model))

    def for_fork(self, config: SessionConfig, data: Any, eval_data: Any) -> Self:
        """Another one with these settings, and with other prompts where they are given.

        Raises:
            DataError: the prompts cannot be used.
        """
        other = copy(self)
        other.config, other.last_stream = config, None
        if data is not None or eval_data is not None:
            loaded = type(self).load(config, self.model, data, eval_data)
            other.held_out, other.rendered = loaded.held_out, {}
            if data is not None:
                other.train, other.max_response_len = loaded.train, loaded.max_response_len
            other.load_tokenizer()
        return other

    def load_tokenizer(self) -> None:
        """Load the tokenizer and measure the longest prompts. Raises ModelError or DataError."""
        try:
            with held():  # Transformers does not survive an import that is cut in two
                with without_garbage_collection():
                    from transformers import AutoTokenizer
                self.tokenizer = AutoTokenizer.from_pretrained(
                    self.model.path,
                    config=own.config_for_tokenizer(self.model.path),
                    trust_remote_code=self.config.model.trust_remote_code,
                    local_files_only=Path(self.model.path).is_dir(),
                )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"The tokenizer of {self.config.model.name!r} cannot be loaded.", why=str(error)
            ) from error
        self.reader = ResponseReader.of(self.tokenizer, self.model, self.config.rollout)
        check_variables(self.tokenizer, self.config.data.chat_template_kwargs)
        self._try_template()
        left_out = self._measure(self.train, "training")
        for prompts in self.held_out:
            words = "held-out" if len(self.held_out) == 1 else f"held-out ({prompts.name})"
            left_out += self._measure(prompts, words)
        first = next(row for row in self.train if self._wanted(row))
        seen = look_at(
            first,
            self.tokenize(first),
            self.tokenizer,
            self.config.data,
            self.reader.end_tokens,
            self.token_text,
        )
        self.first_prompt = replace(seen, warnings=(*left_out, *seen.warnings))
        for words in self.first_prompt.warnings:
            warnings.warn(words, RuntimeWarning, stacklevel=2)

    def _try_template(self) -> None:
        """Render a chat template that the model brings under limits. Raises ModelError."""
        data, model = self.config.data, self.config.model.name
        template = self.tokenizer.chat_template
        if data.apply_chat_template and isinstance(template, str) and model not in SHIPPED:
            prompts = [row.prompt for row in islice(self.train.rows, TRIED)]
            tokens = {name: str(t) for name, t in self.tokenizer.special_tokens_map.items()}
            check_template(template, prompts, tokens | data.chat_template_kwargs, model)

    def _measure(self, prompts: PromptSet, which: str) -> list[str]:
        """Say which rows are left out; raise DataError for what would fail when its turn comes.

        Tokenized are rows that may be too long, and one of each sequence of roles. Rows that are
        generated as they are asked for, are measured then.
        """
        known = prompts.rows if isinstance(prompts.rows, tuple) else ()
        room = self.model.context_length - self.max_response_len
        around = len(self._tokens("a")) + MARGIN if known else 0
        shapes: set[tuple[str, ...]] = set()
        long: list[PromptRow] = []
        for row in known:
            text = row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt)
            # A token is a byte or more.
            may_be_long = around + len(text.encode()) > room
            shape = () if isinstance(row.prompt, str) else tuple(m["role"] for m in row.prompt)
            if shape in shapes and not may_be_long:
                continue
            shapes.add(shape)
            check_tokens(
                self._tokens(row.prompt), self.tokenizer, self.model.vocabulary, row.number
            )
            if not self.fits(row):
                long.append(row)
        if not long:
            return []
        if not self.config.data.filter_overlong_prompts or len(long) == len(known):
            self._refuse(long, len(known), which)
        lengths = ", ".join(f"row {r.number}: {len(self._tokens(r.prompt))}" for r in long[:3])
        return [
            f"{len(long):,} of {len(known):,} {which} prompts are left out, as prompt and response "
            f"do not fit into {self.model.context_length:,} tokens ({lengths} tokens"
            f"{', ...' if len(long) > 3 else ''}; responses up to {self.max_response_len:,})."
        ]

    def _refuse(self, long: list[PromptRow], count: int, which: str) -> None:
        try:
            self.tokenize(long[0])
        except DataError as error:
            if len(long) == 1:
                fix = f"{error.fix} Or let it be left out: data.filter_overlong_prompts: true."
                raise DataError(error.what, fix=fix) from None
            raise DataError(
                error.what,
                why=f"{len(long):,} of {count:,} {which} prompts do not fit.",
                fix=f"{error.fix} Or let such rows be left out: data.filter_overlong_prompts: true."
                if len(long) < count
                else error.fix,
            ) from None

    def render(self, prompt: str | Messages) -> list[int]:
        """Token ids of a prompt, as the settings say. Raises DataError where it cannot be."""
        data = self.config.data
        return render(
            prompt,
            self.tokenizer,
            apply_chat_template=data.apply_chat_template,
            system_prompt=data.system_prompt,
            add_bos_token=data.add_bos_token,
            chat_template_kwargs=data.chat_template_kwargs,
        )

    def _tokens(self, prompt: str | Messages) -> list[int]:
        """What `render` returns, remembered for a while."""
        tokens = self.rendered.get(key := repr(prompt))
        if tokens is None:
            if len(self.rendered) >= RENDERED:
                del self.rendered[next(iter(self.rendered))]
            tokens = self.rendered[key] = self.render(prompt)
        return tokens

    def fits(self, row: PromptRow) -> bool:
        """Whether prompt and longest response fit into the context."""
        length = len(self._tokens(row.prompt)) + self.max_response_len
        return length <= self.model.context_length

    def tokenize(self, row: PromptRow) -> list[int]:
        """Tokenize a prompt. Raises DataError if a response would not fit after it."""
        tokens = self._tokens(row.prompt)
        check_tokens(tokens, self.tokenizer, self.model.vocabulary, row.number)
        check_fits(tokens, self.model.context_length, self.max_response_len, row.number)
        return list(tokens)

    def _wanted(self, row: PromptRow) -> bool:
        return not self.config.data.filter_overlong_prompts or self.fits(row)

    def held_out_rows(self, most: int | None) -> dict[str, list[PromptRow]]:
        """First rows of each held-out set by its name, without those that are left out.

        Raises:
            DataError: there is none.
        """
        if not self.held_out:
            raise DataError(
                "There are no held-out prompts.",
                fix="set data.eval_source, or pass eval_data= to RLSession.start.",
            )
        return {each.name: list(islice(filter(self._wanted, each), most)) for each in self.held_out}

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
        groups = self.pending(rows, n_samples_per_prompt, sampling)
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
            SessionError: a value that cannot be, or more tokens than the session has room for.
        """
        from kit.messages import SamplingSettings

        settings, longest = self.config.rollout, self.max_response_len
        if max_tokens is not None:
            max_tokens = at_least_one(max_tokens, "max_tokens")
        if temperature is not None:
            temperature = checked_temperature(temperature)
        if top_p is not None:
            top_p = share(top_p, "top_p")
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
            stop_token_ids=tuple(sorted(self.reader.end_tokens)),
        )

    def pending(
        self, rows: Sequence[PromptRow], n_samples_per_prompt: int, sampling: SamplingSettings
    ) -> list[Group]:
        """Samples without responses, a group for each row.

        Raises:
            DataError: a prompt and the longest response do not fit into the context.
        """
        groups = []
        for number, row in enumerate(rows):
            tokens = self.tokenize(row)
            opened = opening(tokens, self.tokenizer, prefill(row.prompt))
            first = number * n_samples_per_prompt
            groups.append(
                tuple(
                    Sample(
                        group_index=number,
                        index=index,
                        prompt=row.prompt,
                        tokens=tokens,
                        opening=opened,
                        label=row.label,
                        metadata=row.metadata,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        top_k=sampling.top_k,
                    )
                    for index in range(first, first + n_samples_per_prompt)
                )
            )
        return groups

    def _record(self, generation: Generation) -> RoutedExperts | None:
        layout = self.model.experts
        if generation.experts is None or layout is None:
            return None
        from kit.samples.experts import RoutedExperts

        return RoutedExperts(generation.experts, layout.layers, layout.count)

    def apply_generation(self, sample: Sample, generation: Generation) -> Sample:
        """Append a generation to the sample it continues."""
        kept, status = len(generation.tokens), STATUS[generation.finish]
        texts = [*map(self.token_text, generation.tokens)]
        before = sample.metadata.get("token_texts", []) if sample.response_length else []
        if before and (end := stop_over_seam(before, texts, self.config.rollout.stop)):
            kept, status = end, Status.COMPLETED
        longer = sample.continued(
            generation.tokens[:kept],
            generation.log_probs[:kept],
            generation.weight_version,
            self._record(generation),
            generation.spec_info,
            None if generation.drafted is None else generation.drafted[:kept],
        )
        response, ended = self.reader.read(longer.response_tokens)
        if status is Status.TRUNCATED and ended:  # by the last token that it was allowed
            status = Status.COMPLETED
        if status is Status.ABORTED and longer.response_length >= self.max_response_len:
            status = Status.TRUNCATED
        return replace(
            longer,
            response=response,
            status=status,
            # Ids alone cannot be shown, and a sample has no tokenizer.
            metadata={**sample.metadata, "token_texts": [*before, *texts[:kept]]},
        )


def as_rows(prompts: Sequence[str | Messages] | None) -> list[PromptRow]:
    """Convert prompts given to `generate` to rows. Raises DataError unless they are a list."""
    if prompts is None:
        return []
    given: Any = prompts
    if isinstance(given, Iterator):
        prompts = list(given)
    if isinstance(prompts, str) or not prompts:
        raise DataError(
            f"generate needs a list of prompts, got {prompts!r}.",
            fix="write session.generate(['12+34=']).",
        )
    rows, unchecked = [], cast("Sequence[object]", prompts)
    for number, prompt in enumerate(unchecked, start=1):
        if isinstance(prompt, dict):
            raise DataError(
                f"Prompt {number} is one chat message, not a conversation.",
                fix="a conversation is a list of messages, and generate takes a list of prompts: "
                'write session.generate([[{"role": "user", "content": "..."}]]).',
            )
        checked = check_prompt(prompt, f"Prompt {number}")
        rows.append(PromptRow(prompt=checked, label=None, metadata={}, number=number))
    return rows


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
        rollout = Rollout(written, self._step, self._parts.seconds)
        return replace(rollout, notes=self._sampler.reader.notes(rollout))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._engine_failed = isinstance(error, StackError)
        if error and not self._engine_failed:
            with held(), suppress(StackError):  # the first error is the one to raise
                self._parts.stop()
