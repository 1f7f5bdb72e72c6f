"""A head: a small network on a policy's own hidden states, which drafts for it.

Place i of a text has the policy's last hidden state h_i, after its final norm, and the embedding of
the token that follows, x_{i+1}. A head makes an output o_i of them, which by the policy's output
embedding says what token i + 2 is. As a draft goes on, o_i stands for the h_{i+1} that is not known
yet. Embeddings and output are the policy's, so that a head has no vocabulary of its own.

What is computed between them is in `eagle` and in `mtp`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from kit.models import attention
from kit.models.log_probs import Distributions, forward_kl, token_log_probs
from kit.models.packing import Packed, repeat_rows, rows_before, take_rows, to_device


@dataclass(frozen=True, slots=True)
class PolicyStates:
    """What a head reads of a policy's forward pass over packed samples; no gradient goes there."""

    hidden_T: torch.Tensor
    """Output of its last layer after the final norm, (T, hidden size)."""
    embedded_T: torch.Tensor
    """Embedding of each row's token, (T, hidden size)."""
    output: torch.Tensor
    """The output embedding, whole, (vocabulary, hidden size)."""


class HeadLayers(Protocol):
    """What is computed with a head's own weights, which have the names of its files."""

    def __call__(
        self, before_E: torch.Tensor, embedded_E: torch.Tensor, packed: Packed
    ) -> torch.Tensor:
        """Output for each entry, (E, hidden size), of which the policy's output makes logits.

        Args:
            before_E: the policy's hidden state before the entry's token.
            embedded_E: embedding of the entry's token.
            packed: the entries, as `entries` makes them.
        """


class Head(nn.Module):
    """A head with packed input that returns log-probs, as a `Policy` does."""

    def __init__(self, model: nn.Module) -> None:
        """`model`: the layers, which are called as `HeadLayers` says."""
        super().__init__()
        self.model = model

    def forward(
        self,
        packed: Packed,
        temperature: float,
        states: PolicyStates,
        target: Distributions | None = None,
    ) -> tuple[torch.Tensor]:
        """Log-prob of each response token but the first of its sample, (logp_R,), nats, float32.

        No draft gives the first one, which comes with the prompt. It is the mean of two passes: one
        reads the policy's states, and one the head's own output in their place, which is all that a
        draft has beyond its first token (https://arxiv.org/abs/2408.15766).

        Args:
            packed: the samples.
            temperature: divides the logits, as in sampling.
            states: the policy's, of the same samples.
            target: the policy's distributions in the places of all response tokens; what comes out
                is then how far the head's are from them, (kl_R,), the mean of both passes.
        """
        laid = entries(packed)
        dtype = next(self.model.parameters()).dtype
        output = states.output.to(dtype)
        hidden_E = states.hidden_T[laid.before_E].to(dtype)
        embedded_E = states.embedded_T[laid.token_E].to(dtype)
        if target is not None:
            target = replace(target, hidden_R=target.hidden_R[laid.follows_R])

        def told(out_E: torch.Tensor) -> torch.Tensor:
            take = take_rows if laid.packed.seen_rows is None else repeat_rows
            out_R = take(out_E, laid.packed.predictor_R)
            if target is not None:
                return forward_kl(target, Distributions(out_R, output, temperature))
            return token_log_probs(out_R, output, laid.packed.target_R, temperature)[0]

        first_E = self.model(hidden_E, embedded_E, laid.packed)
        own_E = torch.where(
            laid.previous_E[:, None] < 0, hidden_E, repeat_rows(first_E, laid.previous_E.clamp(0))
        )
        second_E = self.model(own_E, embedded_E, laid.packed)
        return ((told(first_E) + told(second_E)) / 2,)


@dataclass(frozen=True, slots=True)
class Entries:
    """What a head reads of packed samples: each token with the one before it, (E)."""

    packed: Packed
    """The entries as rows; of response tokens without the first of each sample. Only what
    `attention` and a head need is set."""
    token_E: torch.Tensor
    """Row of each entry's token."""
    before_E: torch.Tensor
    """Row of the token before it."""
    previous_E: torch.Tensor
    """The entry of that row; -1 where it begins a sample, and has none."""
    follows_R: torch.Tensor
    """Which response tokens are not the first of their sample."""


def entries(packed: Packed) -> Entries:
    """Lay out what a head reads: each row is an entry, but those that begin a sample."""
    device = packed.tokens_T.device
    position_T = packed.position_T.cpu()
    is_entry_T = position_T > 0
    number_T = is_entry_T.cumsum(0) - 1
    token_E = is_entry_T.nonzero()[:, 0]
    own, seen, first = [], [], 0
    for length, seen_length in zip(packed.own_lengths, packed.seen_lengths, strict=True):
        left = length - int(not is_entry_T[first])
        first += length
        if left:  # all of them see the row that begins their sample
            own.append(left)
            seen.append(seen_length - 1)
    seen_rows = None
    if packed.seen_rows is not None:
        rows = packed.seen_rows.cpu()
        seen_rows = to_device(number_T[rows[is_entry_T[rows]]], device)
    sample_R = packed.sample_R.cpu()
    follows_R = sample_R == sample_R.roll(1)
    follows_R[:1] = False
    moved_R = to_device(follows_R, device)
    laid_out = replace(
        packed,
        tokens_T=packed.tokens_T[to_device(token_E, device)],
        position_T=to_device(position_T[token_E] - 1, device),
        own_lengths=tuple(own),
        seen_lengths=tuple(seen),
        seen_rows=seen_rows,
        predictor_R=to_device(number_T[packed.predictor_R.cpu()[follows_R]], device),
        target_R=packed.target_R[moved_R],
        sample_R=packed.sample_R[moved_R],
        rows_of=(),
        experts=None,
    )
    before_E = rows_before(packed)[token_E]
    previous_E = torch.where(is_entry_T, number_T, -1)[before_E]
    token_E, before_E, previous_E = (to_device(x, device) for x in (token_E, before_E, previous_E))
    return Entries(laid_out, token_E, before_E, previous_E, moved_R)


def run_layer(
    layer: nn.Module, rotary: nn.Module, rows_E: torch.Tensor, packed: Packed
) -> torch.Tensor:
    """Output of a decoder layer of Transformers for each entry, (E, hidden size).

    Args:
        layer: whose attention is the kit's.
        rotary: makes cosines and sines of places.
        rows_E: what it reads, (E, hidden size).
        packed: the entries, as `entries` makes them.
    """
    rows, places = rows_E[None], packed.position_T[None]
    out: torch.Tensor = layer(
        rows,
        position_ids=places,
        position_embeddings=rotary(rows, places),
        packed=attention.layout(packed, rows_E.device),
    )
    return out[0]
