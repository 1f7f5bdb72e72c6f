"""Turns of model families: what a question becomes, and what ends an answer to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, SessionConfig
from kit.config import DataConfig
from kit.data.chat_template import check_variables, opening, render
from kit.data.prompt_check import look_at
from kit.data.prompts import PromptRow
from kit.errors import ConfigError, DataError
from tests import small_models
from tests.chat_templates import ASKED, FAMILIES, TOLD, Turns

QUESTION = PromptRow(ASKED, None, {}, 1)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def end_ids(tokenizer: Any, names: tuple[str, ...]) -> frozenset[int]:
    return frozenset(tokenizer.convert_tokens_to_ids(list(names)))


def warnings_of(turns: Turns, ends: frozenset[int], **settings: Any) -> tuple[str, ...]:
    tokenizer, data = turns.tokenizer(), DataConfig(**settings)
    tokens = render(ASKED, tokenizer, chat_template_kwargs=data.chat_template_kwargs)
    return look_at(QUESTION, tokens, tokenizer, data, ends, str).warnings


@pytest.fixture(params=FAMILIES)
def turns(request: pytest.FixtureRequest) -> Turns:
    return FAMILIES[request.param]


def test_a_question_becomes_what_the_family_was_trained_on_and_begins_once(turns: Turns) -> None:
    tokenizer = turns.tokenizer()
    found = render(ASKED, tokenizer)
    assert found == ids(tokenizer, turns.asked.format(ASKED))
    if turns.adds_bos:  # and so does the tokenizer, to a text
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        assert found.count(tokenizer.bos_token_id) == 1
        plain = render(ASKED, tokenizer, apply_chat_template=False)
        assert plain == [tokenizer.bos_token_id, *ids(tokenizer, ASKED)]


def test_a_system_prompt_has_its_place_or_is_refused(turns: Turns) -> None:
    tokenizer = turns.tokenizer()
    if turns.told is None:
        with pytest.raises(DataError, match=r"refuses.*system(.|\n)*data\.system_prompt empty"):
            render(ASKED, tokenizer, system_prompt=TOLD)
    else:
        found = render(ASKED, tokenizer, system_prompt=TOLD)
        assert found == ids(tokenizer, turns.told.format(ASKED))


def test_switches_of_the_template_reach_it_and_others_are_refused(turns: Turns) -> None:
    tokenizer = turns.tokenizer()
    for variables, expected in turns.switched.values():
        check_variables(tokenizer, variables)
        found = render(ASKED, tokenizer, chat_template_kwargs=variables)
        assert found == ids(tokenizer, expected.format(ASKED))
        begun = expected.rpartition("<think>")[1]
        is_open = bool(begun) and not expected.endswith(("</think>", "</think>\n\n"))
        assert opening(found, tokenizer).startswith("<think>") == is_open
    with pytest.raises(ConfigError, match="does not read"):
        check_variables(tokenizer, ["enable_dreaming"])


def test_nothing_is_said_where_files_name_what_ends_an_answer(turns: Turns) -> None:
    assert warnings_of(turns, end_ids(turns.tokenizer(), turns.ends)) == ()
    for variables, _ in turns.switched.values():
        ends = end_ids(turns.tokenizer(), turns.ends)
        assert warnings_of(turns, ends, chat_template_kwargs=variables) == ()


def test_an_answer_that_nothing_ends_is_told_with_the_token_that_would(turns: Turns) -> None:
    tokenizer = turns.tokenizer()
    others = end_ids(tokenizer, turns.ends) - end_ids(tokenizer, turns.needed)
    (warning,) = warnings_of(turns, others)
    number = tokenizer.convert_tokens_to_ids(turns.needed[0])
    assert repr(turns.needed[0]) in warning
    assert f"rollout.stop_token_ids: [{number}]" in warning


def test_a_template_that_leaves_out_the_bos_of_its_tokenizer_is_told() -> None:
    llama = FAMILIES["Llama 3"]
    without = Turns(**vars(llama) | {"template": llama.template.removeprefix("{{ bos_token }}")})
    (warning,) = warnings_of(without, end_ids(llama.tokenizer(), llama.ends))
    assert "does not begin with '<|begin_of_text|>'" in warning


def test_a_second_bos_is_told() -> None:
    llama = FAMILIES["Llama 3"]
    twice = Turns(**vars(llama) | {"template": "{{ bos_token }}" + llama.template})
    (warning,) = warnings_of(twice, end_ids(llama.tokenizer(), llama.ends))
    assert "begins with '<|begin_of_text|>' twice" in warning


@pytest.mark.slow
def test_trained_tokens_are_the_engines_and_answers_end_at_any_end(
    turns: Turns, tmp_path: Path
) -> None:
    tokenizer = turns.tokenizer()
    folder = small_models.save(tmp_path / "model", tokenizer, eos=turns.eos, eos_token_id=None)
    ends = end_ids(tokenizer, turns.ends)
    generation = {"eos_token_id": sorted(ends)}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = SessionConfig(
        device="cpu",
        model={"name": str(folder)},
        rollout={"max_response_len": 100},
        engine={"replicas": 1},
        training={"rollout_batch_size": 4, "n_samples_per_prompt": 16},
        mismatch={"on_start": "skip"},
    )
    rows = [{"prompt": f"{a} + 1 = ?", "label": ""} for a in range(4)]
    if other := RLSession.current():
        other.close(keep_warm=True)
    with RLSession.start(config, data=rows) as session:
        samples = session.generate()
        trained = session.log_probs(samples)
    ended, asked = 0, [ids(tokenizer, turns.asked.format(row["prompt"])) for row in rows]
    for sample, log_probs in zip(samples, trained, strict=True):
        count = sample.response_length
        prompt, response = sample.tokens[:-count], sample.tokens[len(sample.tokens) - count :]
        assert prompt in asked
        assert sample.rollout_log_probs == pytest.approx(log_probs, rel=0, abs=1e-5)
        assert not ends & set(response[:-1])
        ended += response[-1] in ends
        shown = response[:-1] if response[-1] in ends else response
        assert sample.response == tokenizer.decode(shown)
        assert (sample.status == "completed") == (response[-1] in ends)
    assert ended
