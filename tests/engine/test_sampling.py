"""Sampling depends on a request's seed and position, and on nothing else."""

import pytest
import torch
from torch import tensor

pytestmark = pytest.mark.in_sglang
MASK = (1 << 64) - 1


def unmixed(x: int) -> int:
    """The inverse of SplitMix64's output function, on unsigned 64-bit numbers."""

    def unshift(x: int, by: int) -> int:
        y = x
        for _ in range(64 // by + 1):
            y = x ^ (y >> by)
        return y

    x = unshift(x, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return unshift(x, 30)


def seed_for(bits: int) -> int:
    """The seed whose random number at position 0 is made of these 64 bits."""
    golden = 0x9E3779B97F4A7C15
    seed = unmixed(unmixed(bits)) * pow(golden, -1, 1 << 64) & MASK
    return seed - (1 << 64) if seed >> 63 else seed


def logprobs(rows: int, columns: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.randn(rows, columns, generator=random).log_softmax(-1)


def test_the_mixing_is_splitmix64() -> None:
    from kit.engine.sampling import GOLDEN, mix_bits

    # The first outputs of the reference implementation for the state 1234567.
    states = 1234567 + torch.arange(1, 4) * GOLDEN
    outputs = [int(x) & MASK for x in mix_bits(states)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("bits", [0, MASK, MASK - 1, 1 << 63])
def test_every_random_number_lies_strictly_between_zero_and_one(bits: int) -> None:
    from kit.engine.sampling import multinomial_with_seed, uniform

    seed, position = tensor([seed_for(bits)]), tensor([0])
    value = uniform(seed, position).item()
    assert value == pytest.approx(bits / 2**64, abs=1e-14)
    assert 0 < value < 1
    # Neither end of the range chooses a token whose probability is 0.
    never = tensor([[-torch.inf, -0.3, -torch.inf, -1.0, -torch.inf]])
    assert multinomial_with_seed(never, seed, position).item() == (3 if value > 0.9 else 1)


def test_random_numbers_are_uniform() -> None:
    from scipy import stats

    from kit.engine.sampling import uniform

    numbers = uniform(torch.arange(20_000) // 7, torch.arange(20_000) % 7)
    assert len(numbers.unique()) == 20_000
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("seeds", [[3, 4, 5], [-1, 0, 2**62]])
def test_neighbouring_seeds_and_positions_share_no_number(seeds: list[int]) -> None:
    from kit.engine.sampling import uniform

    seed = tensor(seeds).repeat_interleave(300)
    position = torch.arange(300).repeat(3)
    assert len(uniform(seed, position).unique()) == 3 * 300


def test_a_request_gets_the_same_token_whatever_batch_it_is_in() -> None:
    from kit.engine.sampling import multinomial_with_seed

    rows = logprobs(40, 104)
    seed, position = torch.arange(40) % 5, torch.arange(40) // 5
    together = multinomial_with_seed(rows, seed, position)
    assert together.shape == (40, 1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(6))
    shuffled = multinomial_with_seed(rows[order], seed[order], position[order])
    assert torch.equal(shuffled, together[order])
    for i in range(40):
        alone = multinomial_with_seed(rows[i : i + 1], seed[i : i + 1], position[i : i + 1])
        assert alone.item() == together[i].item()


def test_the_width_of_the_dtype_of_seed_and_position_does_not_matter() -> None:
    from kit.engine.sampling import multinomial_with_seed

    rows, seed, position = logprobs(20, 50), torch.arange(20), torch.arange(20)
    wide = multinomial_with_seed(rows, seed, position)
    assert torch.equal(multinomial_with_seed(rows, seed.int(), position.int()), wide)


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_tokens_come_as_often_as_their_probabilities_say(vary: str) -> None:
    from scipy import stats

    from kit.engine.sampling import multinomial_with_seed

    size = 20_000
    probabilities = tensor([0.5, 0.25, 0.15, 0.07, 0.02, 0.01, 0.0])
    moving, fixed = torch.arange(size), torch.full((size,), 11)
    seed, position = (moving, fixed) if vary == "seed" else (fixed, moving)
    tokens = multinomial_with_seed(probabilities.log().expand(size, -1), seed, position)
    counts = tokens.flatten().bincount(minlength=7)
    assert counts[-1] == 0
    expected = probabilities[:-1].double() * size
    fit = stats.chisquare(counts[:-1].numpy(), (expected * size / expected.sum()).numpy())
    assert fit.pvalue > 0.01


def test_sglang_samples_with_each_request_its_own_seed_once_registered() -> None:
    import sglang.srt.layers.sampler as sampler
    import sglang.srt.sampling.sampling_batch_info as batch_info

    from kit.engine.sampling import multinomial_with_seed, register

    before = sampler.multinomial_with_seed, batch_info.get_server_args
    register()
    try:
        rows = logprobs(6, 30)
        seed, position = torch.arange(6), torch.arange(6)
        tokens = sampler.sampling_from_probs_torch(rows.exp(), seed, position)
        expected = multinomial_with_seed(rows.exp().log(), seed, position).flatten()
        assert tokens.tolist() == expected.tolist()
        filtered = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
            rows.exp(), torch.full((6,), 1), torch.ones(6), torch.zeros(6), False, seed, position
        )
        assert filtered.tolist() == rows.argmax(-1).tolist()
    finally:
        sampler.multinomial_with_seed, batch_info.get_server_args = before
