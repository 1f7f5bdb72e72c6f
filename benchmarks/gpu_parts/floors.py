"""What bytes and operations cost at least: the floors that measured times are held against.

A floor counts what cannot be avoided: each weight read once a decode step, each multiplication
once. Recomputation, sampling, launches and everything else are what lies above it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kit.models.source import ModelShape


@dataclass(frozen=True, slots=True)
class Rates:
    """What the card did in the same run."""

    copy: float
    """Bytes a second, read and written together."""
    matrix: float
    """Operations a second in a large matrix product."""
    to_device: float
    """Bytes a second from pinned host memory."""
    to_host: float


def layer_matrices(shape: ModelShape) -> int:
    """Parameters of all layers that each token is multiplied with: no norms, no embeddings."""
    queries, keys = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    attention = shape.hidden * (2 * queries + 2 * keys)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate)


def head_matrix(shape: ModelShape) -> int:
    """Parameters of the output embedding."""
    return shape.vocabulary * shape.hidden


@dataclass(frozen=True, slots=True)
class Samples:
    """What a batch consists of; lengths in tokens."""

    prompts: int
    group: int
    """Samples of the same prompt, which needs to be computed only once for them."""
    prompt: int
    response: int


def forward_operations(shape: ModelShape, batch: Samples) -> float:
    """Of log-probs of all response tokens: 2 a parameter and token, and causal attention.

    The output embedding counts for response tokens only, because logits of prompts are not needed.
    """
    prompt, response = batch.prompt, batch.response
    tokens = prompt + batch.group * response
    seen = prompt * (prompt + 1) / 2 + batch.group * response * (prompt + (response + 1) / 2)
    layers = 2 * layer_matrices(shape) * tokens
    attention = 4 * shape.layers * shape.heads * shape.head_size * seen
    head = 2 * head_matrix(shape) * batch.group * response
    return batch.prompts * (layers + attention + head)


def training_operations(shape: ModelShape, batch: Samples) -> float:
    """Of a forward and a backward pass, which is twice the forward one; nothing recomputed."""
    return 3 * forward_operations(shape, batch)


def optimizer_bytes(shape: ModelShape) -> int:
    """AdamW in float32: gradient, weight and two moments read, the last three written."""
    return 7 * 4 * shape.parameters


def update_seconds(shape: ModelShape, rates: Rates, batch: Samples) -> float:
    """Floor of an update with one optimizer step."""
    operations = training_operations(shape, batch)
    return operations / rates.matrix + optimizer_bytes(shape) / rates.copy


def decode_step_seconds(
    shape: ModelShape, rates: Rates, requests: int, context: float, width: int
) -> float:
    """Floor of one token for each request: weights and KV cache read, or the arithmetic.

    Args:
        shape: of the model.
        rates: of the card.
        requests: decoded together.
        context: tokens that each request looks back on, on average.
        width: bytes of a number.
    """
    weights = (layer_matrices(shape) + head_matrix(shape)) * width
    read = weights + requests * context * shape.key_value_bytes(width)
    attention = 4 * shape.layers * shape.heads * shape.head_size * context
    operations = requests * (2 * (layer_matrices(shape) + head_matrix(shape)) + attention)
    return max(read / rates.copy, operations / rates.matrix)


def generate_seconds(
    shape: ModelShape, rates: Rates, requests: int, prompt: int, response: int, width: int
) -> float:
    """Floor of whole responses; the prompts' own arithmetic is left out, which is little."""
    context = prompt + (response + 1) / 2
    return response * decode_step_seconds(shape, rates, requests, context, width)


def sync_bytes(shape: ModelShape, width: int) -> int:
    """Float32 weights read, a copy in the engine's width written, read, and written again."""
    return shape.parameters * (4 + 3 * width)


def trainer_state_bytes(shape: ModelShape) -> int:
    """What a sleeping trainer puts into host memory: float32 weights and two moments."""
    return 12 * shape.parameters
