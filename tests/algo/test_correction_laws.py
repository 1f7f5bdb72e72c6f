"""Corrections of off-policy samples: the laws that they obey."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from kit.algo.corrections import effective_sample_size, mis, tis
from tests.algo.token_batches import (
    INF,
    LEVELS,
    NAN,
    Samples,
    Settings,
    Token,
    Tokens,
    batches,
    double,
    packed,
    settings,
    token,
)


@given(batches, settings)
def test_equal_log_probs_weigh_one_and_keep_the_mask(samples: Samples, how: Settings) -> None:
    b = packed(samples)
    for normalize in (False, True):
        got, mask, _ = mis(b.train, b.train, b.sample, b.mask, **how, batch_normalize=normalize)
        assert torch.equal(got, b.mask)
        assert torch.equal(mask, b.mask)
    assert (tis(b.train, b.train, 0.5, 2.0) == 1).all()


@given(batches, settings)
def test_weights_and_masks_stay_within_their_bounds(samples: Samples, how: Settings) -> None:
    b = packed(samples)
    got, mask, told = b.mis(**how)
    low, high = 1 / how["high"] if how["low"] is None else how["low"], how["high"]
    active = b.mask == 1
    assert (got[~active] == 0).all()
    assert (got[active] > 0).all()
    assert ((mask == b.mask) | (mask == 0)).all()
    if how["mode"] == "truncate":
        assert (got <= high).all()
    if how["mode"] == "clip":
        assert ((got[active] >= low) & (got[active] <= high)).all()
    if how["mode"] == "mask":
        assert ((got[mask == 1] >= low) & (got[mask == 1] <= high)).all()
    fractions = [value for name, value in told.items() if "fraction" in name]
    assert all(0 <= f <= 1 for f in fractions)
    weights = tis(b.train, b.rollout, low, high)
    assert ((weights >= low) & (weights <= high)).all()


@given(batches, settings, st.booleans(), st.data())
def test_what_is_on_masked_tokens_changes_nothing(
    samples: Samples, how: Settings, normalize: bool, data: st.DataObject
) -> None:
    b = packed(samples)
    odd = st.lists(
        st.sampled_from([NAN, INF, -INF, -3.0]), min_size=len(b.mask), max_size=len(b.mask)
    )
    train, rollout, advantage = (
        torch.where(b.mask == 1, x, double(data.draw(odd)))
        for x in (b.train, b.rollout, b.advantage)
    )
    moved = Tokens(train, rollout, advantage, b.sample, b.mask)
    for call in (
        lambda x: x.mis(**how, batch_normalize=normalize),
        lambda x: x.opsm(0.05),
    ):
        before, after = call(b), call(moved)
        assert after[-1] == before[-1]
        assert all(torch.equal(x, y) for x, y in zip(after[:-1], before[:-1], strict=True))
    assert effective_sample_size(train - rollout, b.mask) == pytest.approx(
        effective_sample_size(b.train - b.rollout, b.mask)
    )


@given(batches, settings, st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(
    samples: Samples, how: Settings, normalize: bool, random: Random
) -> None:
    order = list(range(len(samples)))
    random.shuffle(order)
    b, moved = packed(samples), packed([samples[i] for i in order])
    places = torch.cat([(b.sample == i).nonzero()[:, 0] for i in order])
    weights, mask, told = b.mis(**how, batch_normalize=normalize)
    moved_weights, moved_mask, moved_told = moved.mis(**how, batch_normalize=normalize)
    torch.testing.assert_close(moved_weights, weights[places])
    assert torch.equal(moved_mask, mask[places])
    assert moved_told == pytest.approx(told)
    assert torch.equal(moved.opsm(0.1)[0], b.opsm(0.1)[0][places])


@given(batches, settings, st.booleans(), st.lists(token, min_size=1, max_size=3))
def test_padding_adds_nothing(
    samples: Samples, how: Settings, normalize: bool, pad: list[Token]
) -> None:
    blank = [(p, r, a, 0) for p, r, a, _ in pad]
    b, longer = packed(samples), packed([[*s, *blank] for s in samples] + [blank])
    real = torch.cat([tensor([1] * len(s) + [0] * len(blank)) for s in [*samples, []]]) == 1
    weights, mask, told = b.mis(**how, batch_normalize=normalize)
    long_weights, long_mask, long_told = longer.mis(**how, batch_normalize=normalize)
    torch.testing.assert_close(long_weights[real], weights)
    assert torch.equal(long_mask[real], mask)
    assert not long_weights[~real].any()
    assert not long_mask[~real].any()
    assert long_told == pytest.approx(told)
    masked, told = b.opsm(0.1)
    long_masked, long_told = longer.opsm(0.1)
    assert torch.equal(long_masked[real], masked)
    assert long_told == pytest.approx(told)


@given(batches, settings)
def test_samples_alone_are_treated_as_they_are_together(samples: Samples, how: Settings) -> None:
    weights, mask, _ = packed(samples).mis(**how)
    alone = [packed([s]).mis(**how) for s in samples]
    assert torch.equal(torch.cat([w for w, _, _ in alone]), weights)
    assert torch.equal(torch.cat([m for _, m, _ in alone]), mask)
    masked = torch.cat([packed([s]).opsm(0.1)[0] for s in samples])
    assert torch.equal(masked, packed(samples).opsm(0.1)[0])


@given(st.lists(token, min_size=1, max_size=8), settings, st.booleans())
def test_for_responses_of_one_token_every_level_is_the_same(
    tokens: list[Token], how: Settings, normalize: bool
) -> None:
    b = packed([[t] for t in tokens])
    by_token, *others = (
        b.mis(**how | {"level": level}, batch_normalize=normalize) for level in LEVELS
    )
    for other in others:
        torch.testing.assert_close(other[0], by_token[0])
        assert torch.equal(other[1], by_token[1])


@given(batches, settings, st.randoms(use_true_random=False))
def test_tokens_of_a_sample_need_not_be_neighbours(
    samples: Samples, how: Settings, random: Random
) -> None:
    b = packed(samples)
    order = list(range(len(b.mask)))
    random.shuffle(order)
    moved = Tokens(*(x[order] for x in (b.train, b.rollout, b.advantage, b.sample, b.mask)))
    torch.testing.assert_close(moved.mis(**how)[0], b.mis(**how)[0][order])
