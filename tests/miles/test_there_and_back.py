"""A configuration that goes to Miles and comes back is the same, but for what the script says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kit.config import SessionConfig
from kit.config.presets import PRESETS
from kit.config.training import Estimator
from kit.errors import ConfigError
from kit.miles import export_script, import_script
from kit.miles.export_script import settings_of
from kit.miles.flags import REASONS
from kit.miles.links import get
from kit.miles.table import LINKS
from tests.cases import some

WORD = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\ue000"),
    min_size=1,
    max_size=12,
).filter(lambda word: word.strip() == word != "")
ODD = st.text("'\"\\$`()[]{}#;&|<>=~*? \u2028\u00a0-!%^,a0", min_size=1, max_size=8).filter(
    lambda word: word.strip() == word != ""
)
"""Made of what means something to a shell, and of ends of lines that are none there."""
WORD |= ODD | st.sampled_from(["(", ")", "--", "-"])
SHARE = st.floats(0.01, 1.0)
COUNT = st.integers(1, 64)
FILE = st.sampled_from(
    ["", "train.jsonl", "/data/my prompts.parquet", "a/b.jsonl@[0:100]", "tiny:chain", "x/y:main"]
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 10**6),
    "model.name": st.sampled_from(["tiny", "Qwen/Qwen3-0.6B", "/models/My Qwen"]),
    "model.context_length": st.none() | st.integers(64, 4096),
    "model.gradient_checkpointing": st.sampled_from([None, True, False, "selective"]),
    "model.lora": st.none()
    | st.fixed_dictionaries(
        {
            "r": COUNT,
            "lora_alpha": COUNT,
            "target_modules": st.sampled_from(["all-linear", ["q_proj", "v_proj"], ["x.o_proj"]]),
            "adapter_path": st.none() | WORD,
        },
        optional={"use_rslora": st.just(True), "modules_to_save": st.just(["norm"])},
    ),
    "data.source": FILE,
    "data.eval_source": FILE,
    "data.input_key": WORD,
    "data.label_key": WORD,
    "data.metadata_key": WORD,
    "data.system_prompt": WORD,
    "data.apply_chat_template": st.booleans(),
    "data.chat_template_kwargs": st.sampled_from(
        [{}, {"enable_thinking": False, "words": "a 'b'"}]
    ),
    "data.filter_overlong_prompts": st.booleans(),
    "data.shuffle": st.booleans(),
    "reward.name": st.sampled_from(["", "math", "gsm8k", "number", "format"]),
    "rollout.temperature": SHARE,
    "rollout.top_p": SHARE,
    "rollout.top_k": st.integers(-1, 50),
    "rollout.max_response_len": st.none() | COUNT,
    "rollout.stop": st.lists(WORD | st.sampled_from(["\n\n", "$HOME", "x\n)"]), max_size=3),
    "rollout.stop_token_ids": st.lists(st.integers(0, 10**6), max_size=3),
    "rollout.skip_special_tokens": st.booleans(),
    "rollout.include_stop_str_in_output": st.booleans(),
    "rollout.dynamic_sampling": st.booleans(),
    "training.num_rollout": COUNT,
    "training.rollout_batch_size": COUNT,
    "training.n_samples_per_prompt": st.sampled_from([2, 4, 8]),
    "training.global_batch_size": st.sampled_from([None, 2, 4, 8]),
    "training.learning_rate": st.floats(0, 0.1),
    "training.lr_schedule": st.sampled_from(["constant", "linear", "cosine"]),
    "training.warmup_steps": st.integers(0, 10),
    "training.adam_beta2": st.floats(0.1, 0.999),
    "training.weight_decay": st.floats(0, 1),
    "training.clip_grad": st.floats(0, 10),
    "training.advantage_estimator": st.sampled_from(Estimator.__args__),
    "training.grpo_std_normalization": st.booleans(),
    "training.normalize_advantages": st.sampled_from([None, True, False]),
    "training.gamma": st.sampled_from([1.0, 0.9]),
    "training.critic.learning_rate": st.sampled_from([1e-5, 3e-4]),
    "training.eps_clip": SHARE,
    "training.eps_clip_high": st.none() | SHARE,
    "training.eps_clip_c": st.none() | st.floats(1.5, 5),
    "training.kl_loss_coef": st.sampled_from([0.0, 0.01]),
    "training.kl_coef": st.sampled_from([0.0, 0.01]),
    "training.kl_loss_type": st.sampled_from(["k1", "k2", "k3", "low_var_kl"]),
    "training.ref_update_interval": st.sampled_from([0, 5]),
    "training.entropy_coef": st.floats(0, 1),
    "training.use_tis": st.sampled_from([None, True]),
    "training.tis_clip": st.floats(1, 5),
    "training.opsm_delta": st.none() | SHARE,
    "training.max_tokens_per_gpu": st.none() | st.integers(1, 20000),
    "training.optimizer_cpu_offload": st.sampled_from([None, True, False]),
    "training.num_trainers": st.sampled_from([1, 2]),
    "engine.mem_fraction_static": st.none() | SHARE,
    "engine.attention_backend": st.sampled_from(["auto", "triton"]),
    "engine.extra": st.sampled_from(
        [{}, {"chunked_prefill_size": 128, "enable_metrics": True}, {"nccl_port": 2}]
    ),
    "engine.tensor_parallel": st.sampled_from([1, 2]),
    "engine.data_parallel": st.sampled_from([1, 2]),
    "cluster.colocate": st.booleans(),
    "memory.sleep": st.sampled_from(["auto", "never", "always"]),
    "evaluation.interval": st.sampled_from([0, 5]),
    "evaluation.temperature": st.sampled_from([0.0, 0.5]),
    "evaluation.max_prompts": st.none() | COUNT,
    "checkpoint.interval": st.sampled_from([0, 10]),
    "logging.use_wandb": st.booleans(),
    "logging.wandb_project": WORD,
    "logging.wandb_group": WORD,
    "logging.wandb_mode": st.sampled_from([None, "offline"]),
    "logging.use_tensorboard": st.booleans(),
}


@st.composite
def configurations(draw: st.DrawFn) -> SessionConfig:
    tree: dict[str, Any] = {}
    for setting in draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=12, unique=True)):
        branch = tree
        *sections, last = setting.split(".")
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = draw(VALUES[setting])
    try:
        return SessionConfig(**tree)
    except ConfigError:
        assume(False)
        raise


def back(config: SessionConfig, folder: Path, backend: str | None = None) -> tuple[Any, Any]:
    exported = export_script(config, backend)
    file = folder / f"{abs(hash(exported.script))}.sh"
    file.write_text(exported.script, encoding="utf-8")
    return exported, import_script(file)


@pytest.mark.wider
@settings(max_examples=some(20, 60), suppress_health_check=list(HealthCheck))
@given(config=configurations(), backend=st.sampled_from([None, "megatron"]))
def test_whatever_the_script_has_no_note_on_comes_back_as_it_was(
    config: SessionConfig, backend: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("scripts")
    exported, imported = back(config, folder, backend)
    lost = {"name", *exported.notes}
    different = {
        setting: (get(config, setting), get(imported.config, setting))
        for setting in settings_of()
        if setting not in lost and get(config, setting) != get(imported.config, setting)
    }
    assert different == {}
    assert imported.unknown == {}
    for setting in exported.notes:
        assert f"{setting}: " in exported.script
    again, _ = back(imported.config, folder, backend)
    assert import_script(next(folder.glob("*.sh"))) is not None
    assert "ray job submit" in again.script


@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_script_of_every_preset_is_bash(preset: str, backend: str, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    config = SessionConfig.preset(preset).replace("training.kl_loss_coef", 0.01)
    script.write_text(export_script(config, backend).script)
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_flag_that_is_written_is_one_of_miles_and_stands_in_the_script_once() -> None:
    config = SessionConfig(
        data={"source": "a.jsonl", "eval_source": "b.jsonl"},
        training={"kl_loss_coef": 0.1, "advantage_estimator": "ppo", "opsm_delta": 0.1},
        logging={"use_wandb": True},
        checkpoint={"interval": 5},
        evaluation={"interval": 5},
        model={"lora": {"adapter_path": "adapter"}},
    )
    known = {flag for link in LINKS for flag in link.flags} | set(REASONS)
    for backend in ("fsdp", "megatron"):
        script = export_script(config, backend).script.partition("ray start")[0]
        lines = [line.split("#")[0] for line in script.splitlines() if "hf download" not in line]
        flags = [word for line in lines for word in line.split() if word.startswith("--")]
        assert [flag for flag in flags if flag not in known] == []
        assert sorted(set(flags)) == sorted(flags)


def test_no_flag_belongs_to_two_settings_or_is_called_without_counterpart() -> None:
    flags = [flag for link in LINKS for flag in link.flags]
    assert len(flags) == len(set(flags))
    settings_linked = [link.setting for link in LINKS]
    assert len(settings_linked) == len(set(settings_linked))
    assert set(settings_linked) <= set(settings_of())
