"""The promises of the embedded model: it is small, it loads, it is half-able, it can be rebuilt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kit.config import ModelConfig
from kit.engine.families.dense_layers import is_dense
from kit.errors import DataError
from kit.models.source import find
from kit.rewards import grade
from kit.tiny import MODEL_DIR, MOE_DIR, SPLITS, TASKS, recipe, rows
from kit.tiny.recipe import Corpus, Habits
from kit.tiny.tasks import is_held_out

PRINTABLE = "".join(map(chr, range(32, 127)))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True).eval()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((MODEL_DIR / "recipe.json").read_text())


# The shipped files


def test_shipped_files_stay_within_four_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) <= 4_000_000


def test_model_is_a_float32_qwen3_that_stops_at_end(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token == "<|end|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_record_names_the_shipped_weights(record: dict[str, Any], model: PreTrainedModel) -> None:
    weights = (MODEL_DIR / "model.safetensors").read_bytes()
    assert record["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["parameters"] == sum(p.numel() for p in model.parameters())


def test_record_was_made_by_the_recipe_as_it_is_now(record: dict[str, Any]) -> None:
    assert record["recipe"] == recipe.settings(recipe.Recipe())


# The mixture of experts


def test_the_mixture_has_a_dense_layer_first_and_then_two_of_eight_experts() -> None:
    source = find(ModelConfig(name="tiny-moe"))
    layout = source.experts
    assert layout is not None
    assert (layout.layers, layout.count, layout.top_k, layout.model_layers) == ((1, 2, 3), 8, 2, 4)
    config = AutoConfig.from_pretrained(MOE_DIR)
    assert [is_dense(config, layer) for layer in range(4)] == [True, False, False, False]
    assert sum(file.stat().st_size for file in MOE_DIR.iterdir()) <= 4_000_000


def test_the_mixture_was_made_by_the_recipe_as_it_is_now_and_is_half_able() -> None:
    made = json.loads((MOE_DIR / "recipe.json").read_text())
    assert made["recipe"] == recipe.settings(recipe.MIXTURE)
    weights = (MOE_DIR / "model.safetensors").read_bytes()
    assert made["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert 0.3 < made["held_out_greedy_accuracy"]["addition"] < 0.6
    mixture: Any = AutoModelForCausalLM.from_pretrained(MOE_DIR, local_files_only=True).eval()
    tokens = AutoTokenizer.from_pretrained(MOE_DIR, local_files_only=True)
    some = rows("addition", "held_out")[:100]
    said = recipe.greedy_responses(mixture, tokens, [row["prompt"] for row in some], 4)
    right = [
        recipe.is_right("addition", answer, row["label"])
        for answer, row in zip(said, some, strict=True)
    ]
    assert 30 < sum(right) < 60


# The tokenizer


@pytest.mark.parametrize(
    "text",
    [PRINTABLE, "", " ", "  two  spaces ", "line\nline\n\n", "\ttab", "don 't , . !", "37+45="],
)
def test_text_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text


def test_each_character_is_one_token_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(set(tokenizer.encode(PRINTABLE + "\n\t"))) == len(PRINTABLE) + 2


def test_other_characters_become_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]


def test_chat_template_renders_the_documented_text(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "37+45="}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>37+45=<|end|><|assistant|>"
    messages = [{"role": "system", "content": "Add."}, *messages]
    messages += [{"role": "assistant", "content": "82"}]
    told = tokenizer.apply_chat_template(messages, tokenize=False)
    assert told == "<|system|>Add.<|end|><|user|>37+45=<|end|><|assistant|>82<|end|>"


def test_chat_template_keeps_white_space_of_the_content(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": " a \n"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|user|> a \n<|end|>"


def test_special_tokens_are_one_token_each(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.encode("<|user|>1<|end|><|assistant|>")
    assert tokenizer.convert_ids_to_tokens(tokens) == ["<|user|>", "1", "<|end|>", "<|assistant|>"]


def test_unknown_role_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="Unknown role"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}], tokenize=False)


# The tasks


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_rows_are_the_same_every_time(task: str, split: str) -> None:
    assert rows(task, split) == rows(task, split)


@pytest.mark.parametrize("task", TASKS)
def test_train_and_held_out_share_no_prompt(task: str) -> None:
    prompts = Counter(row["prompt"] for split in SPLITS for row in rows(task, split))
    assert max(prompts.values()) == 1


def test_addition_holds_out_the_mirror_image_too() -> None:
    held_out = {row["prompt"] for row in rows("addition", "held_out")}
    for row in rows("addition", "held_out"):
        a, b = row["metadata"]["a"], row["metadata"]["b"]
        assert f"{b}+{a}=" in held_out


@pytest.mark.parametrize("task", TASKS)
def test_held_out_has_enough_rows_for_a_steady_figure(task: str) -> None:
    assert len(rows(task, "held_out")) >= 500


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_labels_are_what_python_says(task: str, split: str) -> None:
    for row in rows(task, split):
        assert set(row) == {"prompt", "label", "metadata"}
        assert row["label"] == str(eval(row["prompt"].removesuffix("=")))
        assert (row["metadata"]["task"], row["metadata"]["split"]) == (task, split)


def test_written_steps_end_in_the_label() -> None:
    for row in rows("chain", "train"):
        assert row["metadata"]["steps"].rpartition("=")[2] == row["label"]


@pytest.mark.parametrize("task", TASKS)
def test_response_limit_fits_a_right_response(
    task: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    for row in rows(task, "held_out"):
        response = row["metadata"].get("steps", row["label"])
        assert len(tokenizer.encode(response)) + 1 <= TASKS[task].max_response_tokens


def test_unknown_task_and_split_say_what_exists() -> None:
    with pytest.raises(DataError, match="addition, chain"):
        rows("subtraction", "train")
    with pytest.raises(DataError, match="train, held_out"):
        rows("addition", "test")


def test_corpus_never_shows_a_held_out_question() -> None:
    corpus = Corpus(Habits(), seed=1)
    held_out = {row["prompt"] for row in rows("addition", "held_out")}
    assert held_out.isdisjoint(prompt for prompt, _ in corpus.additions(5000))
    for prompt, _ in corpus.chains(2000, length=4):
        assert not is_held_out("chain", [int(c) for c in prompt[1:-5].split("+")])


# The base model and the recipe


def test_base_gets_about_half_of_the_additions_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]
) -> None:
    accuracy = recipe.measure(model, tokenizer, "addition", "held_out")
    assert 0.3 <= accuracy <= 0.6
    assert accuracy == pytest.approx(record["held_out_greedy_accuracy"]["addition"], abs=0.01)


@pytest.mark.parametrize("response", ["3>1>6>8=8", "=8", "5-8", "=-8", "=1/8", "=0.8", "18", "x"])
def test_the_recipe_grades_as_the_reward_does(response: str) -> None:
    expected = grade(TASKS["chain"].reward, response, "8")
    assert recipe.is_right("chain", response, "8") == (expected == 1.0)


def test_base_fails_on_carries_not_on_sums(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    questions = [row for row in rows("addition", "held_out") if not row["metadata"]["carry"]]
    responses = recipe.greedy_responses(model, tokenizer, [q["prompt"] for q in questions], 8)
    right = sum(q["label"] == r for q, r in zip(questions, responses, strict=True))
    assert right / len(questions) > 0.9


@pytest.mark.slow
def test_recipe_rebuilds_a_model_that_loads_and_learned(tmp_path: Path) -> None:
    short = recipe.Recipe(steps=60, warmup=20, additions_per_step=64, chains_per_step=8)
    first, second = (
        recipe.build(tmp_path / name, short, log=lambda line: None) for name in ("one", "two")
    )
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["loss"]["last"] < 0.6 * first["loss"]["first"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one", local_files_only=True)
    assert model.config.vocab_size == len(tokenizer)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (
        MODEL_DIR / "tokenizer.json"
    ).read_bytes()
