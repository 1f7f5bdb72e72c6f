"""Samples of different lengths in one long row, without padding and without repetition.

What the model computes for a token depends only on it and on the tokens before it. Samples with a
common prefix (all samples of a group share the prompt, and often more) therefore share rows: a
prefix is computed once, and every sample that has it attends to it.

`take_rows`, `put_rows` and `repeat_rows` index such rows with a fast gradient. Torch's indexing has
to allow for repeated rows, so its gradient adds them one after the other; where each row occurs
once, taking and putting are each other's gradient, and both are copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kit.errors import DataError
from kit.models.moe import ExpertTable, Recorded


@dataclass(frozen=True, slots=True)
class Packed:
    """Some samples in one row of T tokens.

    A sequence is a stretch of the row in which each token follows the one before: the prompt of a
    group, or what a sample adds to a shared prefix. There are S sequences, and R response tokens
    to predict.
    """

    tokens_T: torch.Tensor
    position_T: torch.Tensor
    """Position of each token in the samples that it belongs to."""
    own_lengths: tuple[int, ...]
    """Tokens of each sequence in the row, (S); they sum to T."""
    seen_lengths: tuple[int, ...]
    """Tokens that each sequence's last token attends to, itself and those before it, (S)."""
    seen_rows: torch.Tensor | None
    """Row of each of these, sequence after sequence; None where no two sequences share a row."""
    predictor_R: torch.Tensor
    """For each response token, the row of the token before it, whose output predicts it. Samples
    with a common prefix share this row."""
    target_R: torch.Tensor
    """The response tokens."""
    sample_R: torch.Tensor
    """Sample that each response token belongs to."""
    rows_of: tuple[Sequence[int], ...] = ()
    """Rows of each sample's tokens."""
    experts: ExpertTable | None = None
    """The experts that the rows are sent to, where a policy's pass is to follow a record."""
    contradictions: int = 0
    """(row, layer) of which samples that share the row have different records."""

    def to(self, device: torch.device) -> Packed:
        """Copy to a device."""
        names = ("tokens_T", "position_T", "seen_rows", "predictor_R", "target_R", "sample_R")
        tensors = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {
            name: to_device(x, device) for name, x in tensors.items() if x is not None
        }
        experts = self.experts.to(device) if self.experts else None
        return replace(self, experts=experts, **moved)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for the work that runs there."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def pack(
    tokens: Sequence[Sequence[int]],
    response_lengths: Sequence[int],
    *,
    share: bool = True,
    experts: Recorded | None = None,
) -> Packed:
    """Pack samples into one row.

    Args:
        tokens: prompt and response of each sample.
        response_lengths: how many of these tokens are the response.
        share: compute common prefixes once; the results differ by rounding only.
        experts: records of these samples for the policy's routers to follow.

    Raises:
        DataError: a sample has no token before its response, so nothing predicts its first one.
    """
    for place, (row, response) in enumerate(zip(tokens, response_lengths, strict=True)):
        if len(row) <= response:
            raise DataError(
                f"Sample {place} of a micro-batch has {len(row)} tokens, {response} of them its "
                f"response: no token comes before it.",
                fix="give every prompt at least one token.",
            )
    rows = _with_beginnings_shared(tokens, response_lengths) if share else _one_after_other(tokens)
    predictors: list[int] = []
    targets: list[int] = []
    for row, of_row, response in zip(tokens, rows.of_sample, response_lengths, strict=True):
        predictors += of_row[len(row) - response - 1 : len(row) - 1]
        targets += row[len(row) - response :]
    table, contradictions = None, 0
    if experts:
        table, contradictions = experts.table(rows.of_sample, len(rows.tokens))
    return Packed(
        torch.tensor(rows.tokens),
        torch.tensor(rows.position),
        tuple(rows.own_lengths),
        tuple(rows.seen_lengths),
        torch.tensor(rows.seen) if len(rows.seen) > len(rows.tokens) else None,
        torch.tensor(predictors, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(list(response_lengths))),
        tuple(rows.of_sample),
        table,
        contradictions,
    )


def rows_before(packed: Packed) -> torch.Tensor:
    """Row of the token before each row's, in the samples that it belongs to, (T), on the host.

    Of a row that begins a sample it is row 0.
    """
    before_T = torch.zeros(len(packed.tokens_T), dtype=torch.long)
    for rows in packed.rows_of:
        own = torch.tensor(list(rows))
        before_T[own[1:]] = own[:-1]
    return before_T


@dataclass(slots=True)
class _Rows:
    """Assignment of tokens to rows, while it is being built; see `Packed`."""

    of_sample: list[Sequence[int]] = field(default_factory=list)
    """Rows of each sample's tokens."""
    tokens: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    own_lengths: list[int] = field(default_factory=list)
    seen_lengths: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)


def _one_after_other(tokens: Sequence[Sequence[int]]) -> _Rows:
    """Rows without sharing: each sample by itself."""
    rows = _Rows()
    for row in tokens:
        rows.of_sample.append(range(len(rows.tokens), len(rows.tokens) + len(row)))
        rows.tokens += row
        rows.position += range(len(row))
        rows.own_lengths.append(len(row))
    rows.seen_lengths = rows.own_lengths
    return rows


def _with_beginnings_shared(
    tokens: Sequence[Sequence[int]], response_lengths: Sequence[int]
) -> _Rows:
    """Rows in which each common prefix occurs once."""
    rows = _Rows()
    row_of: dict[tuple[int, int], int] = {}
    """Row of a token, by the row of the token before it."""

    def lay(tokens: Sequence[int]) -> list[int]:
        """Rows of a sample's tokens; what is new is appended, as one sequence."""
        before, own_rows, row = len(rows.tokens), [], -1
        for place, token in enumerate(tokens):
            known = row_of.get((row, token))
            if known is None:
                known = row_of[row, token] = len(rows.tokens)
                rows.tokens.append(token)
                rows.position.append(place)
            row = known
            own_rows.append(row)
        if len(rows.tokens) > before:
            rows.own_lengths.append(len(rows.tokens) - before)
            rows.seen_lengths.append(len(own_rows))
            rows.seen.extend(own_rows)
        return own_rows

    for prompt, count in Counter(_prompts(tokens, response_lengths)).items():
        if count > 1:
            lay(prompt)  # by itself, so that no sample of the group is longer than the others
    rows.of_sample += [lay(row) for row in tokens]
    return rows


def _prompts(
    tokens: Sequence[Sequence[int]], response_lengths: Sequence[int]
) -> list[tuple[int, ...]]:
    pairs = zip(tokens, response_lengths, strict=True)
    return [tuple(row[: len(row) - response]) for row, response in pairs]


def micro_batches(
    tokens: Sequence[Sequence[int]],
    response_lengths: Sequence[int],
    max_tokens: int,
    *,
    share: bool = True,
) -> list[list[int]]:
    """Divide samples into micro-batches: lists of indices, each index in one list.

    Samples of one prompt stay together where they fit, if it is to be shared. No list takes more
    than `max_tokens` rows, except for a single sample that is longer.

    Args:
        tokens: prompt and response of each sample.
        response_lengths: how many of these tokens are the response.
        max_tokens: most rows in a micro-batch.
        share: whether `pack` will compute common prefixes once.
    """
    if not share:
        return fit([len(row) for row in tokens], max_tokens)
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(_prompts(tokens, response_lengths)):
        by_prompt.setdefault(prompt, []).append(index)
    units: list[tuple[int, list[int]]] = []
    for prompt, members in by_prompt.items():
        own = [max(1, len(tokens[i]) - len(prompt)) for i in members]
        for part in fit(own, max(1, max_tokens - len(prompt))):
            units.append((len(prompt) + sum(own[i] for i in part), [members[i] for i in part]))
    return [
        sorted(index for unit in together for index in units[unit][1])
        for together in fit([size for size, _ in units], max_tokens)
    ]


def prompts_in_common(tokens: Sequence[Sequence[int]], response_lengths: Sequence[int]) -> float:
    """Fraction of all tokens that is saved if each prompt is computed once."""
    prompts = _prompts(tokens, response_lengths)
    saved = sum(map(len, prompts)) - sum(map(len, set(prompts)))
    return saved / max(sum(map(len, tokens)), 1)


def fit(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Fill bins first-fit in order of falling size. A size over the limit gets its own bin."""
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for place, (used, members) in enumerate(bins):
            if used + sizes[index] <= limit:
                bins[place] = (used + sizes[index], [*members, index])
                break
        else:
            bins.append((sizes[index], [index]))
    return [sorted(members) for _, members in bins]


PutBack = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def sums_of(rows: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare summing by row: (places sorted by their row, end of each row's places)."""
    counts = torch.bincount(rows, minlength=size)
    return torch.argsort(rows, stable=True), torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def put_rows(x: torch.Tensor, rows_T: torch.Tensor, size: int) -> torch.Tensor:
    """Tensor of `size` rows that has `x` at `rows_T` and 0 elsewhere."""
    return x.new_zeros(size, *x.shape[1:]).index_copy(0, rows_T, x)


def take_rows(x: torch.Tensor, rows_T: torch.Tensor) -> torch.Tensor:
    """Index `x[rows_T]`, where each row occurs at most once."""
    taken: torch.Tensor = _TakenRows.apply(x, rows_T, put_rows)  # type: ignore[no-untyped-call]
    return taken


def repeat_rows(
    x: torch.Tensor,
    rows: torch.Tensor,
    order: torch.Tensor | None = None,
    order_ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """Index `x[rows]` with repeats. The gradient is summed in float32, in a fixed order.

    Args:
        x: (size, ...).
        rows: which rows to take.
        order: with `order_ends`, the result of `sums_of(rows, size)`, for a faster gradient on a
            GPU.
        order_ends: see `order`.
    """
    repeated: torch.Tensor
    if order is None or order_ends is None:
        repeated = _TakenRows.apply(x, rows, _add_rows)  # type: ignore[no-untyped-call]
    else:
        repeated = _SummedRows.apply(x, rows, order, order_ends)  # type: ignore[no-untyped-call]
    return repeated


def _add_rows(x: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """Tensor of `size` rows, each the sum of the rows of `x` that belong to it."""
    wide = x.float() if x.element_size() < 4 else x
    total = wide.new_zeros(size, *x.shape[1:])
    if x.is_cuda:  # index_add_ adds there in the order in which threads come
        total.index_put_((rows,), wide, accumulate=True)
    else:
        total.index_add_(0, rows, wide)
    return total.to(x.dtype)


class _TakenRows(torch.autograd.Function):
    """Index `x[rows]`, with the function that computes its gradient given as `back`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, back: PutBack) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.size, ctx.back = len(x), back
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return ctx.back(gradient, rows, ctx.size), None, None


class _SummedRows(torch.autograd.Function):
    """Index `x[rows]` with repeats; the gradient is summed by row in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, order: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order, ends)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        order, ends = ctx.saved_tensors
        return _sum_stretches(gradient, order, ends), None, None, None


@torch.library.custom_op("kit::sum_stretches", mutates_args=())
def _sum_stretches(x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Sum of x[order[ends[i]:ends[i + 1]]] for each row i, computed in float32."""
    sorted_rows = x.flatten(1).index_select(0, order).float()
    total = torch.segment_reduce(sorted_rows, "sum", offsets=ends, axis=0, unsafe=True)
    return total.to(x.dtype).view(-1, *x.shape[1:])


@_sum_stretches.register_fake
def _(x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty((ends.shape[0] - 1, *x.shape[1:]))
