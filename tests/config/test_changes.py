"""Which settings may change while a session runs, and how they are named."""

from __future__ import annotations

from typing import Any

import pytest

from kit import SessionConfig
from kit.config.changes import CHANGEABLE, EVERY, full_names, values, with_changes
from kit.errors import ConfigError

CONFIG = SessionConfig.preset("tiny")


def test_every_changeable_setting_exists_and_can_be_set_to_what_it_is() -> None:
    assert with_changes(CONFIG, values(CONFIG, CHANGEABLE)) == CONFIG
    assert CHANGEABLE < EVERY


def test_a_name_without_a_section_is_one_of_training_or_the_only_one_there_is() -> None:
    given = {"learning_rate": 1e-5, "top_p": 0.9, "training.critic.clip_grad": 1.0}
    assert list(full_names(given)) == [
        "training.learning_rate",
        "rollout.top_p",
        "training.critic.clip_grad",
    ]
    changed = with_changes(CONFIG, {"learning_rate": 1e-5, "rollout.temperature": 0.5})
    assert (changed.training.learning_rate, changed.rollout.temperature) == (1e-5, 0.5)
    with pytest.raises(ConfigError, match=r"evaluation\.temperature or rollout\.temperature"):
        full_names({"temperature": 0.5})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine.replicas": 2}, r"engine\.replicas cannot change while"),
        ({"num_trainers": 2}, "num_trainers cannot change while"),
        ({"training.ref_update_interval": 2}, "cannot change while"),
        ({"model.name": "x"}, r"(?s)model\.name cannot change.*RLSession\.load"),
        ({"seed": 1}, "seed cannot change while"),
        ({"learning_rat": 1}, "Did you mean 'learning_rate'"),
        ({"rollout.temprature": 1}, r"Did you mean 'rollout\.temperature'"),
        ({"nothing.here": 1}, "There is no setting"),
        ({"learning_rate": "fast"}, r"training\.learning_rate is 'fast'"),
        ({"global_batch_size": 3}, "does not divide the rollout"),
        ({"kl_loss_coef": 0.1}, "need a reference model"),
        ({"advantage_estimator": "ppo"}, "ppo has a critic"),
    ],
)
def test_what_cannot_change_or_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_changes(CONFIG, changes)


def test_with_adapters_a_reference_is_there_already() -> None:
    changed = with_changes(SessionConfig.preset("tiny-lora"), {"kl_loss_coef": 0.1})
    assert changed.training.has_reference
    assert changed.model.lora == SessionConfig.preset("tiny-lora").model.lora


def test_changes_are_checked_together() -> None:
    """A rollout of 8 that is divided by 8: neither of both could be changed first."""
    small = CONFIG.replace("training.rollout_batch_size", 2).replace(
        "training.n_samples_per_prompt", 2
    )
    changed = with_changes(small, {"global_batch_size": 8, "n_samples_per_prompt": 4})
    assert changed.training.steps_per_rollout == 1


def test_settings_are_not_set_in_place() -> None:
    for part in (CONFIG, CONFIG.training):
        with pytest.raises(ConfigError, match=r"(?s)in place.*config\.replace.*session\.configure"):
            part.name = part.learning_rate = 1.0  # type: ignore[union-attr, assignment]
