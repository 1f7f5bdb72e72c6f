"""A head: a small network on a policy's own hidden states, which drafts for it.

Place i of a text has the policy's last hidden state h_i, after its final norm, and the embedding of
the token that follows, x_{i+1}. A head makes an output o_i of them, which by the policy's output
embedding says what token i + 2 is. As a draft goes on, o_i stands for the h_{i+1} that is not known
yet. Embeddings and output are the policy's, so that a head has no vocabulary of its own; but those
of EAGLE-3 have one, and h_i is made there of what several of the policy's layers put out.

What is computed between them is in `eagle`, `eagle3` and `mtp`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from kit.models import attention
from kit.models.log_probs import Distributions, forward_kl, token_log_probs
from kit.models.packing import Packed, repeat_rows, rows_before, take_rows, to_device


@dataclass(frozen=True, slots=True)
class PolicyStates:
    """What a head reads of a policy's forward pass over packed samples; no gradient goes there."""

    hidden_T: torch.Tensor
    """Output of its last layer after the final norm, (T, hidden size); or of those layers that the
    head reads, side by side."""
    embedded_T: torch.Tensor
    """Embedding of each row's token, (T, hidden size)."""
    output: torch.Tensor
    """The output embedding, whole, (vocabulary, hidden size)."""


class HeadLayers(nn.Module):
    """What is computed with a head's own weights, which have the names of its files."""

    reads: tuple[int, ...] = ()
    """Layers of the policy whose output it reads; none reads that of the last, after its norm."""
    words_D: torch.Tensor | None
    """The token of each row of its own output embedding; None where rows are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words_D", None, persistent=False)

    def forward(
        self, before_E: torch.Tensor, embedded_E: torch.Tensor, packed: Packed
    ) -> torch.Tensor:
        """Output for each entry, (E, hidden size), which the next one reads in a draft.

        Args:
            before_E: what the policy knows before the entry's token; see `given`.
            embedded_E: embedding of the entry's token.
            packed: the entries, as `entries` makes them.
        """
        raise NotImplementedError

    def given(self, hidden_E: torch.Tensor) -> torch.Tensor:
        """What an entry reads of the policy's hidden states, (E, hidden size)."""
        return hidden_E

    def said(self, out_R: torch.Tensor) -> torch.Tensor:
        """Output of which logits are made, (R, hidden size)."""
        return out_R

    def output(self, policys: torch.Tensor) -> torch.Tensor:
        """The output embedding: the policy's, or one of its own."""
        return policys


class Head(nn.Module):
    """A head with packed input that returns log-probs, as a `Policy` does."""

    def __init__(self, model: HeadLayers) -> None:
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

        Of a token that is no word of the head's it is 0: the head can neither draft nor learn it.
        No draft gives the first one, which comes with the prompt. It is the mean of two passes: one
        reads the policy's states, and one the head's own output in their place, which is all that a
        draft has beyond its first token (https://arxiv.org/abs/2408.15766).

        Args:
            packed: the samples.
            temperature: divides the logits, as in sampling.
            states: the policy's, of the same samples.
            target: the policy's distributions in the places of all response tokens; what comes out
                is then how far the head's are from them, over the head's words, (kl_R,), the mean
                of both passes.
        """
        laid = entries(packed)
        dtype = next(self.model.parameters()).dtype
        output = self.model.output(states.output.to(dtype))
        hidden_E = self.model.given(states.hidden_T[laid.before_E].to(dtype))
        embedded_E = states.embedded_T[laid.token_E].to(dtype)
        if target is not None:
            target = replace(target, hidden_R=target.hidden_R[laid.follows_R])
        target_R, known_R = laid.packed.target_R, None
        if (words_D := self.model.words_D) is not None:
            target_R, known_R = among_words(target_R, words_D, len(states.output))
            if target is not None:
                target = replace(target, head=target.head[words_D])

        def told(out_E: torch.Tensor) -> torch.Tensor:
            take = take_rows if laid.packed.seen_rows is None else repeat_rows
            out_R = self.model.said(take(out_E, laid.packed.predictor_R))
            if target is not None:
                return forward_kl(target, Distributions(out_R, output, temperature))
            logp_R = token_log_probs(out_R, output, target_R, temperature)[0]
            return logp_R if known_R is None else torch.where(known_R, logp_R, 0)

        first_E = self.model(hidden_E, embedded_E, laid.packed)
        own_E = torch.where(
            laid.previous_E[:, None] < 0, hidden_E, repeat_rows(first_E, laid.previous_E.clamp(0))
        )
        second_E = self.model(own_E, embedded_E, laid.packed)
        return ((told(first_E) + told(second_E)) / 2,)


def among_words(
    token_R: torch.Tensor, words_D: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(number of each token among a head's words, whether it is one of them), (R).

    Args:
        token_R: the tokens.
        words_D: the token of each word.
        tokens: how many there are.
    """
    number_V = torch.full((tokens,), -1, device=words_D.device)
    number_V[words_D] = torch.arange(len(words_D), device=words_D.device)
    number_R = number_V[token_R]
    return number_R.clamp(0), number_R >= 0


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
