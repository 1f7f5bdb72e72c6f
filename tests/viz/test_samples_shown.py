"""What a person reads off a sample, a rollout, a batch, a comparison."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kit.samples import Batch, Rollout, Sample, Status
from kit.samples.token_values import texts as token_texts
from kit.viz import compare_samples
from kit.viz.samples.rollout import all_equal, group_marks
from kit.viz.samples.scales import surprise
from tests.viz.conftest import Show
from tests.viz.results import make_batch, make_rollout

MARK = "all equal: nothing to learn"


def sample(reward: float | None, group: int = 0, **fields: object) -> Sample:
    made = Sample(group_index=group, prompt="1+1=", response="2", response_length=1, tokens=[5, 6])
    return replace(made, reward=reward, status=Status.COMPLETED, **fields)  # type: ignore[arg-type]


def test_the_headline_of_a_rollout_counts_right(html: Show, plain: Show) -> None:
    rollout = Rollout(
        [
            sample(1.0, response_length=10),
            sample(0.0, response_length=30),
            replace(sample(0.5, 1, response_length=20), status=Status.TRUNCATED),
            sample(0.5, 1, response_length=20),
        ],
        step=7,
        seconds=2.0,
    )
    for shown in (html(rollout), plain(rollout)):
        assert "Rollout of step 7: 2 prompts x 2 samples" in shown
    words = plain(rollout)
    for fact in ("mean reward 0.5", "mean length 20 tokens", "longest 30 tokens"):
        assert fact in words
    for fact in ("truncated 25.0%", "generated 40 tokens/s", "all equal 1 of 2 groups"):
        assert fact in words


def test_groups_of_different_sizes_are_not_called_a_product(plain: Show) -> None:
    rollout = Rollout([sample(1.0), sample(0.0), sample(1.0, 1)])
    assert "2 prompts, 3 samples" in plain(rollout)


def test_groups_without_a_difference_are_marked_and_others_are_not(html: Show) -> None:
    equal = Rollout([sample(0.9), sample(0.9)])
    different = Rollout([sample(0.9), sample(0.1)])
    assert html(equal).count(MARK) == 1
    assert MARK not in html(different)


def test_one_sample_or_none_scored_is_not_a_group_without_a_difference() -> None:
    assert not all_equal([sample(1.0)])
    assert not all_equal([sample(None), sample(None)])
    assert not all_equal([sample(1.0), sample(None)])
    assert all_equal([sample(0.0), sample(0.0)])


def test_a_failed_sample_shows_its_error_and_marks_its_group(html: Show) -> None:
    group = [sample(1.0), sample(1.0).with_failure("ValueError: no number in 'abc'")]
    page = html(Rollout(group))
    assert "ValueError: no number in &#39;abc&#39;" in page
    assert "✗ failed" in page
    assert group_marks(group) == ["✗ 1 failed sample: the group is left out of the update"]


def test_the_prompt_of_a_group_is_shown_once(html: Show) -> None:
    rollout = Rollout([sample(float(i % 2), prompt="What is 12+34?") for i in range(8)])
    assert html(rollout).count("What is 12+34?") == 1


def test_eight_groups_are_open_and_the_rest_is_folded(html: Show) -> None:
    page = html(make_rollout(groups=12))
    opened, folded = page.split("<details><summary>4 more groups of this rollout")
    assert opened.count('<div class="kv-group">') == 8
    assert folded.count('<div class="kv-group">') == 4


def test_advantages_have_a_column_where_they_are_known(html: Show, plain: Show) -> None:
    rollout = make_batch().rollout
    assert "advantage" not in html(make_rollout()).split("</style>")[1]
    assert html(rollout).count('<th scope="col" class="kv-num">advantage</th>') == 10
    assert "advantage +0.935" in plain(rollout)
    mixed = Rollout([rollout[0], *make_rollout()[1:8]])
    assert ">–</span>" in html(mixed)
    assert "–" in plain(mixed)


def test_a_rollout_says_how_to_look_closer(html: Show) -> None:
    assert "rollout.best()" in html(make_rollout(1))


def test_an_empty_rollout_says_so(html: Show, plain: Show) -> None:
    assert "no samples" in html(Rollout([]))
    assert "no samples" in plain(Rollout([]))


def test_a_rollout_without_rewards_is_called_not_scored(html: Show, plain: Show) -> None:
    rollout = Rollout([sample(None), sample(None)])
    assert "mean reward not scored" in plain(rollout)
    assert "nan" not in plain(rollout).lower()
    assert MARK not in html(rollout)


def test_odd_rewards_still_show(html: Show) -> None:
    page = html(Rollout([sample(math.nan), sample(math.inf), sample(-3.0), sample(2.5)]))
    for number in ("NaN", "inf", "-3", "2.5"):
        assert f">{number}<" in page


def test_answers_that_differ_within_a_group_get_a_column(html: Show) -> None:
    same = html(Rollout([sample(1.0, label="46"), sample(0.0, label="46")]))
    differ = html(Rollout([sample(1.0, label="46"), sample(0.0, label="47")]))
    assert "answer: 46" in same
    assert "answer: 46" not in differ
    assert '<td class="kv-fit">47</td>' in differ


def test_a_sample_shows_each_token_with_its_log_prob(html: Show) -> None:
    shown = html(
        sample(1.0, response="47", response_length=2, tokens=[1, 20, 23],
               rollout_log_probs=[math.log(0.5), math.log(0.001)])
    )  # fmt: skip
    assert '<i class="p1" title="token 0, id 20, rollout log-prob -0.693 (50.0%)">4</i>' in shown
    assert 'title="token 1, id 23, rollout log-prob -6.91 (0.1%)">7<b>^</b></i>' in shown


@pytest.mark.parametrize(
    ("probability", "place"),
    [(1.0, 0), (0.9001, 0), (0.89, 1), (0.4, 2), (0.05, 3), (0.001, 4), (0.0, 4)],
)
def test_tokens_are_classed_by_probability(probability: float, place: int) -> None:
    assert surprise(math.log(probability) if probability else -math.inf) == place


def test_token_texts_come_from_metadata_then_letters_then_ids() -> None:
    base = sample(1.0, response="ab", response_length=2, tokens=[1, 7, 8])
    assert token_texts(base) == ["a", "b"]
    assert token_texts(replace(base, response="abc")) == ["7", "8"]
    assert token_texts(replace(base, metadata={"token_texts": ["x", "y"]})) == ["x", "y"]
    assert token_texts(replace(base, metadata={"token_texts": ["x"]})) == ["a", "b"]
    assert token_texts(replace(base, response_length=0)) == []


def test_tokens_that_do_not_train_are_marked(html: Show) -> None:
    page = html(sample(1.0, response="ab", response_length=2, tokens=[1, 2], loss_mask=[1, 0],
                       rollout_log_probs=[-0.5, -0.5]))  # fmt: skip
    assert page.count("not trained on") == 3  # the token's title, the legend, the table
    assert '<i class="p1 m"' in page


def test_a_sample_without_log_probs_says_so(html: Show) -> None:
    assert "the engine gave no log-probabilities" in html(sample(1.0))


def test_a_batch_shows_each_advantage_and_what_was_left_out(html: Show, plain: Show) -> None:
    batch = make_batch()
    page = html(batch)
    assert "prompt 12: the reward failed on 1 of 8 samples" in page
    assert page.count(MARK) == 2
    assert "0.935" in page
    assert "better than their group 28   worse 36" in plain(batch)


def test_advantages_grow_to_both_sides_of_the_middle(html: Show) -> None:
    page = html(Batch((sample(1.0), sample(0.0, response="3")), (2.0, -1.0)))
    assert '<i style="left:50%;width:50%">' in page
    assert '<i style="left:25%;width:25%" class="kv-minus">' in page


def test_an_empty_batch_shows(html: Show, plain: Show) -> None:
    batch = Batch((), (), left_out=("prompt 0: all failed",))
    assert "prompt 0: all failed" in html(batch)
    assert "0 samples" in plain(batch)


def test_a_comparison_pairs_prompts_by_their_words() -> None:
    before = Rollout([sample(0.0, prompt="a"), sample(1.0, 1, prompt="b"), sample(0.0, 2)])
    after = Rollout([sample(0.5, 5, prompt="b"), sample(1.0, 9, prompt="a")])
    shown = compare_samples(before, after)
    assert "2 prompts in both" in shown.html
    assert "1 prompt only in one of the two" in shown.html
    words = str(shown)
    assert "▲ better 1   = same 0   ▼ worse 1" in words
    first, second, how = words.splitlines()[-3:]
    assert "session.annotate" in how
    assert first.split()[0] == "a"
    assert "▲ better" in first
    assert "▼ worse" in second


def test_a_comparison_without_common_prompts_says_so() -> None:
    shown = compare_samples(Rollout([sample(1.0, prompt="a")]), Rollout([sample(1.0, prompt="b")]))
    assert "0 prompts in both" in shown.plain
    assert "2 prompts only in one of the two" in shown.html


def test_a_comparison_shows_no_more_than_asked() -> None:
    rollout = make_rollout(groups=12)
    shown = compare_samples(rollout, rollout, n=3)
    assert "… 9 more prompts" in shown.html
    assert shown.html.count("= same</td>") == 3
