"""Rewards and displays see what the model wrote, without what ended it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from kit import RLSession, SessionConfig
from kit.config import RolloutConfig
from kit.data.chat_template import opening, render
from kit.errors import ConfigError
from kit.messages import Generation
from kit.models.source import ModelSource
from kit.rewards import build, score_samples
from kit.rollout.response import ResponseReader
from kit.samples import Rollout, Sample, Status
from tests import small_models

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TOKENIZER = small_models.tokenizer(special=(*small_models.SPECIAL, *TAGS))
END = 2


def tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def reader(model_ends: tuple[int, ...] = (), **settings: object) -> ResponseReader:
    model = ModelSource("", 256, "", 0, frozenset(model_ends))
    return ResponseReader.of(TOKENIZER, model, SessionConfig(rollout=settings).rollout)


def test_special_tokens_stay_and_the_one_that_ended_the_response_goes() -> None:
    text = "<think>1+1</think><answer>2</answer>"
    assert reader().read([*tokens(text), END]) == (text, True)
    assert reader().read(tokens(text)) == (text, False)
    assert reader(skip_special_tokens=True).read([*tokens(text), END]) == ("1+12", True)


@pytest.mark.parametrize(
    ("one", "named"),
    [
        ("the model's files", {"model_ends": (0, 65)}),
        ("the settings", {"stop_token_ids": (65,)}),
        ("the tokenizer", {}),
    ],
)
def test_an_end_token_is_known_from(one: str, named: dict[str, tuple[int, ...]]) -> None:
    last = END if one == "the tokenizer" else 65
    assert reader(**named).read([*tokens("ab"), last]) == ("ab", True)


def test_an_end_token_that_the_tokenizer_does_not_hold_for_special_goes_too() -> None:
    made = small_models.tokenizer(special=("<|endoftext|>",), plain=("<|im_end|>",))
    end = made.convert_tokens_to_ids("<|im_end|>")
    assert made.decode([end], skip_special_tokens=True) == "<|im_end|>"
    reads = ResponseReader.of(made, ModelSource("", 9, "", 0, frozenset({end})), RolloutConfig())
    assert reads.read([*made.encode("72"), end]) == ("72", True)


def test_an_end_token_in_the_middle_stays() -> None:
    assert reader().read([*tokens("a"), END, *tokens("b"), END]) == ("a<|im_end|>b", True)


def test_a_stop_string_is_cut_off_unless_the_settings_keep_it() -> None:
    written = tokens("so 46</answer>")
    assert reader(stop=("6<", "</answer>")).read(written) == ("so 4", True)
    assert reader(stop=("</answer>",)).read(written) == ("so 46", True)
    kept = reader(stop=("</answer>",), include_stop_str_in_output=True)
    assert kept.read(written) == ("so 46</answer>", True)


def test_a_format_that_needs_a_stop_string_which_is_cut_off_is_refused() -> None:
    reward = {"name": "format", "format_pattern": "<answer>.*</answer>"}
    with pytest.raises(ConfigError, match=r"include_stop_str_in_output: true"):
        SessionConfig(rollout={"stop": ["</answer>"]}, reward=reward)
    SessionConfig(
        rollout={"stop": ["</answer>"], "include_stop_str_in_output": True}, reward=reward
    )


def test_tokens_are_told_from_those_of_another_text() -> None:
    written = [*tokens("<think>a</think>7"), END]
    for text in ("<think>a</think>7", "a7", "<think>a</think>7<|im_end|>", "<think>a"):
        assert reader().could_read(written, text), text
    assert not reader().could_read(written, "b7")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("Assistant: let me see. <think>", "<think>"),
        ("[/INST][THINK]", "[THINK]"),
        ("<|im_start|>assistant\n", ""),
        ("<think>\n\n</think>\n\n", ""),
        ("1 < 2 and 3 > 2", ""),
        ("[INST] a [/INST]", ""),
        ("a<|im_end|>", ""),
    ],
)
def test_the_tag_that_a_prompt_opens_last(text: str, found: str) -> None:
    assert opening(tokens(text), TOKENIZER) == found


def test_rewards_get_what_the_prompt_opened_and_exact_compares_what_was_written() -> None:
    opened = Sample(response="so 3</think>3", opening="<think>\n", label="3")
    seen: list[str] = []

    def own(sample: Sample) -> float:
        seen.append(sample.response)
        return 1.0

    async def waiting(sample: Sample) -> float:
        return own(sample)

    def whole(samples: list[Sample]) -> list[float]:
        return [own(sample) for sample in samples]

    for reward in (own, waiting, whole):
        assert score_samples([opened], reward)[0].response == opened.response
    assert seen == ["<think>\nso 3</think>3"] * 3
    config = SessionConfig(reward={"name": "format", "format_pattern": "^<think>.*</think>"})
    assert score_samples([opened], build(config.reward, "exact"))[0].reward == 1.0
    answer = replace(opened, response="3", opening="<answer>")
    assert score_samples([answer], "exact")[0].reward == 1.0


# ---- a model whose tokenizer is unusual, in a session -------------------------------------------

STRANGE = small_models.tokenizer(
    special=("<|endoftext|>", "<|im_start|>", *TAGS),
    plain=("<|im_end|>",),
    template=small_models.THINKING,
)


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RLSession]:
    """Only its tokenizer names the token that ends a turn; its template opens the thinking."""
    if running := RLSession.current():
        running.close(keep_warm=True)
    folder = small_models.save(tmp_path_factory.mktemp("strange"), STRANGE, eos_token_id=0)
    config = SessionConfig(
        name="strange",
        device="cpu",
        model={"name": str(folder)},
        reward={"name": "format", "format_pattern": "^<think>.*</think>"},
        rollout={"max_response_len": 150},
        engine={"replicas": 1},
        training={"rollout_batch_size": 8, "n_samples_per_prompt": 4},
    )
    rows = [{"prompt": f"{a}+{a}=", "label": str(2 * a)} for a in range(8)]
    with RLSession.start(config, data=rows) as session:
        yield session


@pytest.fixture(scope="module")
def written(strange: RLSession) -> Rollout:
    return strange.generate()


@pytest.mark.slow
def test_the_tokenizers_end_token_ends_a_response_though_no_config_names_it(
    strange: RLSession, written: Rollout
) -> None:
    end = strange.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ended = [s for s in written if end in s.response_tokens]
    assert ended, "the random model never ends its turn: nothing is tested"
    for sample in ended:
        assert sample.response_tokens.index(end) == sample.response_length - 1
        assert sample.status is Status.COMPLETED
        assert "<|im_end|>" not in sample.response


@pytest.mark.slow
def test_tags_that_are_special_tokens_reach_the_reward(
    strange: RLSession, written: Rollout
) -> None:
    ids = set(strange.tokenizer.convert_tokens_to_ids(TAGS))
    tagged = [bool(ids & set(s.response_tokens)) for s in written]
    assert any(tagged), "the random model writes no tags: nothing is tested"
    scored = strange.score(
        written, lambda s: float(any(tag in s.response.removeprefix("<think>\n") for tag in TAGS))
    )
    assert scored.rewards() == list(map(float, tagged))


@pytest.mark.slow
def test_perfect_answers_to_a_prompt_that_opens_the_thinking_are_rewarded(
    strange: RLSession, written: Rollout
) -> None:
    assert written[0].opening == "<think>\n"
    perfect = written.with_samples(replace(s, response="so 3</think>3") for s in written)
    assert set(strange.score(perfect).rewards()) == {1.0}


@pytest.mark.slow
def test_an_end_token_in_the_last_place_allowed_completes_the_response(strange: RLSession) -> None:
    sampler = strange.debug.sampler
    prompt = render("1+1=", strange.tokenizer)
    end = strange.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for last, status in ((end, Status.COMPLETED), (60, Status.TRUNCATED)):
        wrote = Generation([60, last], [-1.0, -1.0], "length", 0)
        assert sampler.apply_generation(Sample(tokens=prompt), wrote).status is status
