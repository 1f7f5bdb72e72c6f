"""Samples keep everything through a file, and a rollout answers the questions asked of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.errors import DataError
from kit.samples import Batch, Rollout, Sample, Status


def scored(*rewards: float | None, group: int = 2) -> Rollout:
    """Samples with these rewards, `group` of them to a prompt."""
    return Rollout(
        [Sample(group_index=i // group, index=i, reward=r) for i, r in enumerate(rewards)],
        step=7,
        seconds=1.5,
    )


# Everything a Python string can hold, lone surrogates included: a model's broken UTF-8 makes them.
any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=12)


def made(mask: list[int] | None, **fields: Any) -> Sample:
    """A sample with as much of a mask as it has response tokens."""
    return Sample(loss_mask=mask and mask[: fields["response_length"]], **fields)


any_sample = st.builds(
    made,
    group_index=st.integers(0, 9),
    index=st.integers(0, 99),
    prompt=any_text | st.lists(st.fixed_dictionaries({"role": any_text, "content": any_text})),
    tokens=st.lists(st.integers(0, 151_935), max_size=5),
    response=any_text,
    response_length=st.integers(0, 5),
    label=st.none() | any_text,
    reward=st.none() | st.floats(allow_nan=False),
    mask=st.none() | st.lists(st.integers(0, 1), min_size=5, max_size=5),
    status=st.sampled_from(Status),
    metadata=st.dictionaries(any_text, st.none() | st.integers() | any_text, max_size=2),
    rollout_log_probs=st.none() | st.lists(st.floats(max_value=0, allow_nan=False), max_size=5),
    weight_versions=st.lists(st.integers(0, 9), max_size=2),
    error=st.none() | any_text,
)


@settings(deadline=None)
@given(st.lists(any_sample, max_size=3))
def test_a_saved_rollout_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]
) -> None:
    path = tmp_path_factory.mktemp("rollout") / "r.jsonl"
    rollout = Rollout(samples, 3, 1.5, {"rollout/aborted": 2.0}, ["smaller than configured"])
    loaded = Rollout.load(rollout.save(path))
    assert loaded == rollout
    assert all(isinstance(s.status, Status) for s in loaded)
    assert len(path.read_bytes().splitlines()) == max(len(samples), 1)


def test_files_of_samples_alone_are_still_read(tmp_path: Path) -> None:
    old = {"group_index": 1, "index": 2, "tokens": [4, 5], "response_length": 1, "reward": 0.5}
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(old) + "\n" + json.dumps(old) + "\n")
    rollout = Rollout.load(path)
    assert (rollout.step, rollout.seconds, len(rollout)) == (0, 0.0, 2)
    assert rollout[0].token_values == {}


def test_a_first_line_whose_rollout_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"rollout": {"stepp": 3}}\n')
    with pytest.raises(DataError, match=r"line 1: not a sample: .*stepp"):
        Rollout.load(path)


def test_values_of_tokens_survive_a_file(tmp_path: Path) -> None:
    sample = Sample(
        tokens=[4, 5, 6], response_length=2, annotated_versions=[0, 1],
        token_values={"entropy": [0.5, math.inf], "advantage": [1.0, -2.0]},
    )  # fmt: skip
    (again,) = Rollout.load(Rollout([sample]).save(tmp_path / "r.jsonl"))
    assert again == sample


def test_values_that_do_not_fit_the_response_are_refused() -> None:
    with pytest.raises(DataError, match=r"'entropy'\] has 1 numbers for 2"):
        Sample(tokens=[4, 5, 6], response_length=2, token_values={"entropy": [0.5]})
    with pytest.raises(DataError, match="loss_mask has 1 numbers for 2 response tokens"):
        Sample(tokens=[4, 5, 6], response_length=2, loss_mask=[1])
    with pytest.raises(DataError, match="more than two weight versions"):
        Sample(annotated_versions=[0, 1, 2])


def test_what_is_written_behind_a_sample_makes_its_values_unknown() -> None:
    sample = Sample(
        tokens=[4, 5], response_length=1, weight_versions=[0], rollout_log_probs=[-0.1],
        token_values={"entropy": [0.5]}, annotated_versions=[0],
    )  # fmt: skip
    for other in (sample.continued([6], [-0.2], 1), sample.reset_response()):
        assert (other.token_values, other.annotated_versions) == ({}, [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "Expecting property name"),
        (b"", "Expecting value"),
        (b"42", "not a number"),
        (b"null", "not nothing"),
        (b"[1, 2]", "not a list"),
        (b'{"rewrad": 1}', "no field 'rewrad'"),
        (b'{"status": "lost"}', "'lost'"),
        (b'{"response": "\xff"}', "no UTF-8"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(Sample(response="fine").to_dict()).encode()
    path = tmp_path / "rollout.jsonl"
    path.write_bytes(b"\n".join([good, good, line, good]))
    with pytest.raises(DataError, match=reason) as caught:
        Rollout.load(path)
    assert f"{path}, line 3: not a sample" in str(caught.value)


def test_prompt_and_response_tokens_part_at_the_response_length() -> None:
    sample = Sample(tokens=[5, 6, 7, 8], response_length=3)
    assert (sample.prompt_tokens, sample.response_tokens) == ([5], [6, 7, 8])
    silent = Sample(tokens=[5, 6], response_length=0)
    assert (silent.prompt_tokens, silent.response_tokens) == ([5, 6], [])


def test_every_response_token_trains_unless_the_mask_says_otherwise() -> None:
    assert Sample(response_length=3).mask == [1, 1, 1]
    assert Sample(response_length=3, loss_mask=[0, 1, 0]).mask == [0, 1, 0]


def test_chat_messages_read_as_text_line_by_line() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert Sample(prompt=messages).prompt_text == "Be brief.\n2+2?"
    assert Sample(prompt="2+2?").prompt_text == "2+2?"


def test_a_failure_takes_the_reward_and_leaves_the_original_alone() -> None:
    sample = Sample(reward=1.0, status=Status.COMPLETED)
    failed = sample.with_failure("ZeroDivisionError: division by zero")
    assert (failed.reward, failed.status) == (None, Status.FAILED)
    assert failed.error == "ZeroDivisionError: division by zero"
    assert (sample.reward, sample.status, sample.error) == (1.0, Status.COMPLETED, None)
    assert failed.with_reward(0.5).error is None


def test_samples_results_and_batches_cannot_be_changed_in_place() -> None:
    for thing, name in (
        (Sample(), "reward"),
        (scored(1.0), "step"),
        (Batch(samples=(), advantages=()), "step"),
    ):
        with pytest.raises(AttributeError):
            setattr(thing, name, 1)


def test_groups_follow_the_order_of_their_first_sample_wherever_the_others_lie() -> None:
    rollout = Rollout([Sample(group_index=g, index=i) for i, g in enumerate([3, 1, 3, 2, 1])])
    assert [[s.index for s in group] for group in rollout.groups()] == [[0, 2], [1, 4], [3]]


def test_the_mean_reward_counts_only_samples_that_have_one() -> None:
    assert scored(1.0, None, 0.0, 0.5).mean_reward() == 0.5
    assert scored(1.0, None, 0.0, 0.5).rewards() == [1.0, 0.0, 0.5]
    assert math.isnan(scored(None, None).mean_reward())


def test_best_and_worst_pass_over_samples_without_a_reward() -> None:
    rollout = scored(None, -2.0, -1.0, -3.0, None)
    assert (rollout.best().reward, rollout.worst().reward) == (-1.0, -3.0)


@pytest.mark.parametrize("ask", [Rollout.best, Rollout.worst])
def test_asking_for_the_best_before_scoring_says_to_score(ask: Any) -> None:
    with pytest.raises(DataError, match="None of the 2 samples") as caught:
        ask(scored(None, None))
    assert "session.score" in str(caught.value)


def test_failed_samples_can_be_listed() -> None:
    bad = Sample(index=1).with_failure("no")
    assert Rollout([Sample(), bad, Sample(index=2)]).failed().samples == (bad,)
    assert not Rollout([Sample()]).failed()


def test_a_slice_of_a_rollout_is_a_rollout_of_the_same_step() -> None:
    rollout = scored(0.0, 1.0, 2.0, 3.0)
    part = rollout[1:3]
    assert isinstance(part, Rollout)
    assert [s.index for s in part] == [1, 2]
    assert (part.step, part.seconds) == (7, 1.5)
    assert rollout[-1].index == 3
    assert (len(rollout), [s.index for s in rollout]) == (4, [0, 1, 2, 3])


def test_a_table_has_a_row_for_each_sample_and_keeps_missing_rewards_missing() -> None:
    samples = [
        Sample(group_index=4, index=0, prompt="1+1", response="2", label="2", reward=1.0,
               response_length=1, status=Status.COMPLETED),
        Sample(group_index=4, index=1, prompt=[{"role": "user", "content": "1+1"}]).with_failure(
            "KeyError: 'x'"
        ),
    ]  # fmt: skip
    table = Rollout(samples).to_pandas()
    assert list(table["group"]) == [4, 4]
    assert list(table["prompt"]) == ["1+1", "1+1"]
    assert list(table["status"]) == ["completed", "failed"]
    assert table["reward"][0] == 1.0
    assert math.isnan(table["reward"][1])
    assert table["error"][1] == "KeyError: 'x'"
    assert list(table["length"]) == [1, 0]
    assert table["advantage"].isna().all()


def test_a_sample_as_a_table_has_a_row_for_each_token_and_a_column_for_each_quantity() -> None:
    sample = Sample(
        tokens=[1, 5, 6], response_length=2, response="ab", rollout_log_probs=[-0.5, -1.0],
        token_values={"trainer_log_prob": [-0.25, -1.0], "own": [3.0, 4.0]}, loss_mask=[1, 0],
    )  # fmt: skip
    table = sample.to_pandas()
    assert list(table["text"]) == ["a", "b"]
    assert list(table["token"]) == [5, 6]
    assert list(table["trained"]) == [True, False]
    assert list(table["difference"]) == [0.25, 0.0]
    assert list(table["own"]) == [3.0, 4.0]


def test_a_batch_as_a_rollout_knows_the_advantages_of_its_tokens() -> None:
    samples = tuple(Sample(index=i, tokens=[1, 2, 3], response_length=2) for i in range(2))
    alike = Batch(samples, (0.5, -0.5), step=4).rollout
    assert [s.token_values["advantage"] for s in alike] == [[0.5, 0.5], [-0.5, -0.5]]
    assert (alike.step, [s.advantage for s in alike]) == (4, [0.5, -0.5])
    own = Batch(samples, (0.0, 0.0), token_advantages=((1.0, 2.0), (3.0, 4.0))).rollout
    assert own[1].token_values["advantage"] == [3.0, 4.0]


def test_a_batch_names_both_numbers_where_samples_and_advantages_differ() -> None:
    with pytest.raises(DataError, match="2 samples and 3 advantages"):
        Batch(samples=(Sample(), Sample()), advantages=(0.0, 0.0, 0.0))


def test_each_batch_has_an_id_of_its_own() -> None:
    ids = {Batch(samples=(), advantages=()).id for _ in range(50)}
    assert len(ids) == 50


def test_printed_samples_are_the_table_that_a_notebook_shows_and_not_their_fields() -> None:
    samples = tuple(
        Sample(
            group_index=number // 4,
            index=number,
            prompt="1+1=",
            tokens=[1, 2, 3],
            response="2",
            response_length=2,
            label="2",
            reward=1.0,
        )
        for number in range(128)
    )
    rollout = Rollout(samples)
    assert str(rollout) == rollout._repr_mimebundle_()["text/plain"]
    assert str(rollout).startswith("Rollout of step 0: 32 prompts x 4 samples")
    assert len(str(rollout)) < 2000
    batch = Batch(samples, tuple(0.0 for _ in samples))
    for shown in (samples[0], batch):
        assert str(shown) == shown._repr_mimebundle_()["text/plain"]
