"""Sampling that depends on a request's own seed and on its place, and on nothing else in the batch.

SGLang samples with a seed per request only in its deterministic mode, which wants kernels that are
slower. The sampler itself works without; what switches it on is one setting, read where a batch's
sampling parameters are put together. Here that place reads it as on.

What draws by seed is not SGLang's. Its random numbers have 32 bits, of which the highest makes a
token certain, however improbable: with a vocabulary of 150,000 tokens that happens once in 30,000
draws. On a GPU most tokens are drawn by `kit.engine.gpu.sampling`.

    relies on   layers/sampler.py: multinomial_with_seed
                sampling/sampling_batch_info.py: get_server_args, SamplingBatchInfo.sampling_seed
"""

from __future__ import annotations

from typing import Any

import torch

# The constants of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
# Generators", 2014), as signed 64-bit numbers.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)


class _WithSeeds:
    """The server's arguments, with one of them read as True."""

    enable_deterministic_inference = True

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arguments, name)


def mix_bits(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function, on int64 tensors that wrap around."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), float64, (B), from seed and position alone."""
    bits = mix_bits(mix_bits(seed.long() * GOLDEN) + positions.long() * GOLDEN)
    # 48 bits: so far from 1 that no product with a sum of probabilities is rounded up to the sum.
    return (((bits >> 16) & ((1 << 48) - 1)).double() + 0.5) / (1 << 48)


def multinomial_with_seed(
    logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Draw one sample per row, (B, 1), by inversion; `logprobs` is (B, vocabulary).

    One random number a row, where the Gumbel trick takes one a token.
    """
    up_to = logprobs.double().exp_().cumsum_(dim=1)
    drawn = uniform(seed, positions)[:, None] * up_to[:, -1:]
    return torch.searchsorted(up_to, drawn, right=True)  # the first that is above


def draws_from_all(info: Any) -> bool:
    """Whether tokens come from the whole distribution, or are its likeliest.

    Args:
        info: SGLang's sampling parameters of a batch.
    """
    if info.is_all_greedy:
        return True
    return not (info.need_top_p_sampling or info.need_top_k_sampling or info.need_min_p_sampling)


def register() -> None:
    """Give every request of this process' SGLang its own seed."""
    import sglang.srt.layers.sampler as sampler
    import sglang.srt.sampling.sampling_batch_info as batch_info

    original = batch_info.get_server_args
    batch_info.get_server_args = lambda: _WithSeeds(original())
    sampler.multinomial_with_seed = multinomial_with_seed
