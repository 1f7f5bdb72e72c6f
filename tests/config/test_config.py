"""A configuration is whole, printable, and refuses what cannot work before anything starts."""

import os
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from kit.config import SessionConfig
from kit.config.presets import PRESETS
from kit.errors import ConfigError

EXAMPLE = """
model:
  name: Qwen/Qwen3-0.6B
training:
  num_rollout: 10
  rollout_batch_size: 4
  global_batch_size: 16
  learning_rate: 1e-6
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        SessionConfig(**settings)
    return str(caught.value)


def test_a_short_file_sets_what_it_names_and_defaults_fill_the_rest(write: Any) -> None:
    config = SessionConfig.load(write(EXAMPLE))
    assert config.model.name == "Qwen/Qwen3-0.6B"
    assert config.training.num_rollout == 10
    assert config.training.rollout_batch_size == 4
    assert config.training.global_batch_size == 16
    rest = SessionConfig()
    assert config.rollout == rest.rollout
    assert config.training.n_samples_per_prompt == rest.training.n_samples_per_prompt == 8
    assert config.training.rollout_size == 32


@pytest.mark.parametrize("number", ["1e-6", "1E-6", "1.e-6", "0.1e-5", ".1e-5", "1.0e-06", "+1e-6"])
def test_a_learning_rate_is_a_number_however_it_is_written(write: Any, number: str) -> None:
    config = SessionConfig.load(write(f"training: {{learning_rate: {number}}}"))
    assert config.training.learning_rate == pytest.approx(1e-6, rel=1e-12)


def test_words_that_only_look_like_numbers_stay_words(write: Any) -> None:
    config = SessionConfig.load(write("name: 1e-6-run\nmodel: {name: e5}"))
    assert (config.name, config.model.name) == ("1e-6-run", "e5")


def test_a_printed_configuration_is_whole(write: Any) -> None:
    config = SessionConfig.load(write(EXAMPLE))
    printed = yaml.safe_load(str(config))
    for name, section in SessionConfig.model_fields.items():
        assert name in printed
        keys = getattr(section.annotation, "model_fields", {})
        assert set(keys) <= set(printed[name] if keys else ())
    assert printed["training"]["eps_clip_high"] == 0.28
    assert printed["training"]["num_rollout"] == 10


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_way_through_a_file(name: str, tmp_path: Path) -> None:
    config = SessionConfig.preset(name)
    assert config.name == name
    assert SessionConfig.load(config.dump(tmp_path / "c.yaml")) == config


def test_settings_of_every_kind_survive_the_way_through_a_file(tmp_path: Path) -> None:
    config = SessionConfig(
        name="Übung, 3: ja",
        reward={"weights": {"math": 0.9, "format": 0.1}, "format_pattern": r"\[\d+\]"},
        rollout={"stop": ["\n\n", "1e5", "yes"], "temperature": 0.7, "top_k": 20},
        engine={"extra": {"chunked_prefill_size": 128}, "max_total_tokens": 4096},
        training={"learning_rate": 3e-7, "eps_clip_high": None, "eps_clip_c": 3.0},
        mismatch={"warn_above": 1e-6},
    )
    assert SessionConfig.load(config.dump(tmp_path / "c.yaml")) == config


def test_an_empty_file_gives_the_defaults(write: Any) -> None:
    assert SessionConfig.load(write("# nothing yet\n")) == SessionConfig()


@pytest.mark.parametrize(
    ("settings", "suggestion"),
    [
        ({"trainning": {"num_rollout": 1}}, "'trainning'. Did you mean 'training'?"),
        (
            {"training": {"num_rolouts": 1}},
            "'training.num_rolouts'. Did you mean 'num_rollout'?",
        ),
        ({"learning_rate": 1e-6}, "'learning_rate'. Did you mean training.learning_rate?"),
        ({"model": {"top_p": 0.9}}, "'model.top_p'. Did you mean rollout.top_p?"),
        ({"model": {"qqqq": 1}}, "'model.qqqq'. Known: compile, context_length,"),
        ({"model": {"lora": {"alpha": 1}}}, "'model.lora.alpha'. Did you mean 'lora_alpha'?"),
        ({"training": {"mis": {"hi": 1}}}, "'training.mis.hi'. Did you mean 'high'?"),
        ({"self": 1}, "'self'. Known: checkpoint, cluster, data,"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(
    settings: dict[str, Any], suggestion: str
) -> None:
    assert f"There is no setting {suggestion}" in refusal(**settings)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"training": {"num_rollout": "ten"}}, ["training.num_rollout", "'ten' (str)"]),
        ({"training": {"num_rollout": 0}}, ["training.num_rollout", "0 (int)", "greater than 0"]),
        ({"training": {"num_rollout": 2.5}}, ["training.num_rollout", "2.5 (float)"]),
        ({"training": {"num_rollout": None}}, ["training.num_rollout", "None"]),
        ({"training": {"learning_rate": [1]}}, ["training.learning_rate", "[1] (list)"]),
        ({"training": {"learning_rate": float("nan")}}, ["training.learning_rate", "nan"]),
        (
            {"training": {"learning_rate": 10}},
            ["training.learning_rate", "10 (int)", "less than 1"],
        ),
        ({"training": {"kl_loss_coef": float("inf")}}, ["training.kl_loss_coef", "finite"]),
        ({"training": {"kl_loss_type": "k4"}}, ["training.kl_loss_type", "'k4'", "'k3'"]),
        (
            {"rollout": {"temperature": 0}},
            ["rollout.temperature", "0 (int)", "greater than or equal"],
        ),
        ({"rollout": {"top_p": 1.5}}, ["rollout.top_p", "1.5"]),
        ({"data": "tiny"}, ["data is 'tiny'", "it is a section"]),
        ({"training": [1, 2]}, ["training is [1, 2] (list)", "it is a section"]),
        ({"device": "tpu"}, ["device", "'tpu'", "'cuda'"]),
    ],
)
def test_a_wrong_value_is_refused_with_its_full_key_and_itself(
    settings: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(**settings)
    assert [part for part in parts if part not in message] == []


def test_all_wrong_settings_are_named_at_once() -> None:
    message = refusal(training={"num_rollout": 0, "adam_eps": -1}, nmae="x")
    assert message.startswith("3 settings are wrong:\n")
    for key in ("training.num_rollout", "training.adam_eps", "'nmae'"):
        assert key in message


@pytest.mark.parametrize(
    ("training", "parts"),
    [
        (
            {"rollout_batch_size": 4, "n_samples_per_prompt": 8, "global_batch_size": 12},
            ["global_batch_size is 12", "32 samples", "such as 8"],
        ),
        (
            {"rollout_batch_size": 4, "n_samples_per_prompt": 8, "global_batch_size": 64},
            ["global_batch_size is 64", "32 samples", "such as 32"],
        ),
        ({"n_samples_per_prompt": 1}, ["n_samples_per_prompt is 1", "2 or more"]),
        ({"num_trainers": 3}, ["num_trainers is 3", "128 samples"]),
        (
            {"num_trainers": 4, "global_batch_size": 2},
            ["num_trainers is 4", "2 samples of an optimizer step"],
        ),
        ({"learning_rate": 1e-6, "min_learning_rate": 1e-5}, ["1e-05", "1e-06", "lower it"]),
    ],
)
def test_batch_sizes_and_rates_that_cannot_go_together_are_refused_with_numbers(
    training: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(training=training)
    assert [part for part in parts if part not in message] == []
    assert "What to do:" in message


@pytest.mark.parametrize(
    ("training", "parts"),
    [
        ({"kl_loss_coef": 0.1, "kl_coef": 0.1}, ["kl_loss_coef", "kl_coef", "twice"]),
        ({"use_tis": True, "mis": {}}, ["use_tis", "mis", "keep one"]),
        ({"use_tis": True, "use_rollout_logprobs": True}, ["use_rollout_logprobs", "again"]),
        ({"mis": {}, "use_rollout_logprobs": True}, ["use_rollout_logprobs", "again"]),
        ({"ref_update_interval": 5}, ["ref_update_interval", "no reference model", "kl_coef"]),
        (
            {"advantage_estimator": "dr_grpo", "calculate_per_token_loss": True},
            ["calculate_per_token_loss", "constant length"],
        ),
        ({"advantage_estimator": "cispo", "eps_clip_c": 3.0}, ["eps_clip_c", "cispo"]),
        ({"critic": {"learning_rate": 1e-4}}, ["critic", "grpo has no critic", "ppo"]),
        ({"gamma": 0.9}, ["gamma is 0.9", "grpo", "same advantage"]),
        ({"lambd": 0.9, "advantage_estimator": "reinforce_plus_plus"}, ["lambd", "only ppo"]),
        ({"use_tis": True, "tis_clip": 1.0, "tis_clip_low": 2.0}, ["tis_clip_low 2.0", "1.0"]),
        ({"n_samples_per_prompt": 1, "advantage_estimator": "rloo"}, ["rloo", "2 or more"]),
        ({"mis": {"low": 3.0}}, ["low (3.0)", "high (2.0)"]),
        ({"mis": {"rs_low": 0.1}}, ["rs_level", "nothing would be rejected"]),
        ({"mis": {"level": "batch"}}, ["training.mis.level", "'batch'"]),
        ({"advantage_estimator": "grp"}, ["advantage_estimator", "'grp'", "grpo"]),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(
    training: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(training=training)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "ppo"])
def test_estimators_that_need_no_group_take_one_sample_a_prompt(estimator: str) -> None:
    training = {"advantage_estimator": estimator, "n_samples_per_prompt": 1}
    assert SessionConfig(training=training).training.rollout_size == 16


def test_a_warning_threshold_above_the_failing_one_is_refused() -> None:
    assert "warn_above 0.2" in refusal(mismatch={"warn_above": 0.2, "fail_above": 0.1})


def test_a_reward_has_a_name_or_weights_but_not_both() -> None:
    assert "keep one" in refusal(reward={"name": "math", "weights": {"format": 1.0}})


def test_what_is_not_yaml_is_refused_with_the_place(write: Any) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML") as caught:
        SessionConfig.load(write("training: {num_rollout: 1\nmodel: ["))
    assert "line 2" in str(caught.value)


def test_a_file_of_other_bytes_is_refused(write: Any) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML"):
        SessionConfig.load(write(b"name: \xff\xfe"))


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n- b", "list"), ("just words", "str"), ("1: {a: 2}", "dict")]
)
def test_a_file_that_is_no_mapping_of_settings_is_refused(write: Any, text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"holds a {kind}, not a mapping of settings"):
        SessionConfig.load(write(text))


@pytest.mark.parametrize("name", ["missing.yaml", ""])
def test_a_missing_file_is_refused_by_its_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="There is no configuration file") as caught:
        SessionConfig.load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "What to do:" in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'tinny'.*\n.*Did you mean 'tiny'"):
        SessionConfig.preset("tinny")


def test_a_session_starts_from_a_configuration_a_preset_or_a_file(write: Any) -> None:
    path = write(EXAMPLE)
    config = SessionConfig.load(path)
    assert SessionConfig.of(config) is config
    assert SessionConfig.of(path) == SessionConfig.of(str(path)) == config
    assert SessionConfig.of("tiny") == SessionConfig.preset("tiny")


def test_replacing_a_setting_changes_a_copy_only() -> None:
    config = SessionConfig.preset("tiny")
    changed = config.replace("training.num_rollout", 5).replace("name", "short")
    assert (changed.training.num_rollout, changed.name) == (5, "short")
    assert config == SessionConfig.preset("tiny")
    back = changed.replace("training.num_rollout", config.training.num_rollout)
    assert back.replace("name", "tiny") == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.num_rolout", 5, "Did you mean 'num_rollout'"),
        ("trainig.num_rollout", 5, "Did you mean 'training'"),
        ("name.first", 5, "There is no section 'name'"),
        ("training.num_rollout", -1, "training.num_rollout is -1"),
        ("training.global_batch_size", 3, "does not divide"),
    ],
)
def test_replacing_checks_as_strictly_as_loading(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SessionConfig().replace(key, value)


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = SessionConfig()
    with pytest.raises(ConfigError, match="not changed in place"):
        config.training.num_rollout = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"session\.configure"):
        config.name = "x"  # type: ignore[misc]


def test_every_setting_says_what_it_does() -> None:
    def silent(section: type[BaseModel]) -> list[str]:
        found = []
        for name, setting in section.model_fields.items():
            kinds = (setting.annotation, *get_args(setting.annotation))
            parts = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
            found += [n for part in parts for n in silent(part)]
            if not (parts or setting.description):
                found.append(f"{section.__name__}.{name}")
        return found

    assert silent(SessionConfig) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed: yes", "seed is True (bool): a number is meant"),
        ("seed: 1:30", "seed is '1:30' (str)"),
        ("training: {learning_rate: on}", "training.learning_rate is True (bool)"),
        ("rollout: {max_response_len: no}", "rollout.max_response_len is False (bool)"),
        ("seed: 1\nname: a\nseed: 2", "the key 'seed' is there twice (line 3"),
        ("a: &a [*a]", "a value holds itself"),
        ("seed: " + "9" * 5000, "cannot be read"),
        ("engine: {extra: " + "[" * 2000, "nested more than"),
    ],
)
def test_what_yaml_would_misread_is_refused(write: Any, text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SessionConfig.load(write(text))
    assert why in str(caught.value)


def test_a_setting_that_may_be_true_still_may(write: Any) -> None:
    config = SessionConfig.load(
        write("rollout: {dynamic_sampling: yes}\nlogging: {use_wandb: off}")
    )
    assert (config.rollout.dynamic_sampling, config.logging.use_wandb) == (True, False)


@pytest.mark.parametrize("long", [{"k" * 2_000_000: 1}, {"name": ["v" * 2_000_000]}])
def test_an_error_stays_short_whatever_it_quotes(long: Any) -> None:
    for settings in (long, {"training": long}, {f"{name}{i}": 1 for name in long for i in (1, 2)}):
        with pytest.raises(ConfigError) as caught:
            SessionConfig(**settings)
        assert len(str(caught.value)) < 2000
    assert len(str(ConfigError("x" * 10**6, why="y" * 10**6, fix="z" * 10**6))) < 30_000


def test_a_file_of_settings_is_a_regular_file_of_a_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "long.yaml").write_text("# " + "x" * 2_000_000)
    for name, why in (("zero", "a device"), ("pipe", "a named pipe"), ("long", "more than")):
        with pytest.raises(ConfigError, match=why):
            SessionConfig.load(tmp_path / f"{name}.yaml")
