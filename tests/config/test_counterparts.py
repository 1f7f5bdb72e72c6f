"""An unknown setting that TRL, verl or Miles has is answered with its name here."""

from __future__ import annotations

from typing import Any

import pytest

from kit import SessionConfig
from kit.config.counterparts import COUNTERPARTS
from kit.errors import ConfigError
from kit.miles.export_script import settings_of
from kit.miles.table import LINKS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_generations": 8}, "TRL's num_generations is training.n_samples_per_prompt here"),
        ({"training": {"num_generations": 8}}, "training.n_samples_per_prompt"),
        ({"beta": 0.1}, "training.kl_loss_coef"),
        ({"training": {"gradient_accumulation_steps": 2}}, "training.global_batch_size"),
        ({"training": {"loss_type": "dapo"}}, "calculate_per_token_loss: true"),
        ({"rollout": {"n": 4}}, "verl's actor_rollout_ref.rollout.n is training.n_samples"),
        ({"actor_rollout_ref.rollout.n": 4}, "training.n_samples_per_prompt"),
        ({"actor_rollout_ref": {"rollout": {"n": 4}}}, "is a section of verl's"),
        ({"training": {"lr": 1e-6}}, "training.learning_rate"),
        ({"--rollout-max-response-len": 64}, "rollout.max_response_len"),
        ({"data": {"enable_thinking": False}}, "data.chat_template_kwargs"),
        ({"lora_r": 8}, "TRL's lora_r is model.lora here"),
        ({"model": {"lora_rank": 8}}, "verl's actor_rollout_ref.model.lora_rank is model.lora"),
        ({"use_vllm": True}, "the engine is always SGLang"),
        ({"temperature": 1.0}, "Did you mean rollout.temperature?"),
        ({"training": {"learning_rat": 1}}, "Did you mean 'learning_rate'?"),
    ],
)
def test_the_name_of_another_library_is_answered_with_the_one_here(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        SessionConfig(**settings)
    assert words in str(caught.value)


def test_every_counterpart_is_a_setting_and_every_flag_of_miles_has_one() -> None:
    known = set(settings_of())
    assert [entry.ours for entry in COUNTERPARTS if entry.ours and entry.ours not in known] == []
    named = {(entry.ours, flag) for entry in COUNTERPARTS for flag in entry.miles}
    for link in LINKS:
        own = link.setting.rpartition(".")[2]
        for flag in (flag.removeprefix("--").replace("-", "_") for flag in link.flags):
            found = flag == own or (link.setting, flag) in named or ("", flag) in named
            assert found, f"{link.setting}: {flag}"


def test_no_name_has_two_counterparts_of_one_library() -> None:
    for names in (
        [name for entry in COUNTERPARTS for name in entry.trl],
        [name for entry in COUNTERPARTS for name in entry.verl],
    ):
        assert len(names) == len(set(names))
