"""Launch scripts as people write them are understood, and never run."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kit.cli.app import app
from kit.config import SessionConfig
from kit.errors import ConfigError
from kit.miles import export_script, import_script
from kit.miles import rewards as miles_rewards
from kit.samples import Sample

GOLDEN = Path(__file__).parent / "golden.sh"

MODEL = """\
MODEL_ARGS=(
   --num-layers 28
   --rotary-base "${BASE:-1000000}"
   --qk-layernorm
)
"""
SCRIPT = """\
#!/bin/bash
touch RUN   # would be seen
set -ex
if [ "$(nvidia-smi | wc -l)" -gt 0 ]; then
    GPUS=4
fi
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${SCRIPT_DIR}/models/qwen3-0.6B.sh"
: "${DATA_DIR:=/data}"
LENGTH=${LENGTH:-2048}
cat <<'EOF' > /dev/null
python3 train.py --hf-checkpoint not/this
EOF
CKPT_ARGS=( --hf-checkpoint /models/Qwen3-0.6B --ref-load "/models/Qwen3 dist" ) # both
ROLLOUT_ARGS=(
   --prompt-data $DATA_DIR/math.jsonl   # don't stumble over the apostrophe
   #--prompt-data other.jsonl
   --input-key 'the prompt' --label-key=label
   --apply-chat-template
   --rollout-max-response-len "$LENGTH"
   --rollout-stop '$END' "a b" \\
   --rm-type math --num-rollout 300
   --rollout-batch-size 32 --n-samples-per-prompt 8
   --num-steps-per-rollout 2
)
GRPO_ARGS=(--advantage-estimator gspo --use-kl-loss --kl-loss-coef 1e-3 --eps-clip 4e-4)
GRPO_ARGS+=( --eps-clip-high 5e-4 )
EVAL_ARGS=(
   --eval-interval 20
   --eval-prompt-data aime $DATA_DIR/aime.jsonl gsm8k $DATA_DIR/gsm8k.jsonl
   --n-samples-per-eval-prompt 16
   --eval-max-responce-len 16384
)
WANDB_ARGS=( --use-wandb --wandb-project tests --wandb-key ${WANDB_KEY} )
SGLANG_ARGS=( --sglang-mem-fraction-static 0.7 --sglang-chunked-prefil-size 64
   --sglang-log-level info )
[ "$OFFLOAD" = 1 ] && PERF_ARGS+=( --fsdp-cpu-offload )
RUNTIME_ENV_JSON="{
  \\"env_vars\\": {\\"PYTHONPATH\\": \\"/root/Megatron-LM/\\"}
}"
ray job submit --address="http://127.0.0.1:8265" \\
   --runtime-env-json="${RUNTIME_ENV_JSON}" \\
   -- python3 train.py \\
   --actor-num-nodes 1 \\
   --actor-num-gpus-per-node 2 \\
   --colocate --tensor-model-parallel-size 2 \\
   ${MODEL_ARGS[@]} "${CKPT_ARGS[@]}" ${ROLLOUT_ARGS[@]} ${GRPO_ARGS[@]} ${EVAL_ARGS[@]} \\
   ${WANDB_ARGS[@]} ${SGLANG_ARGS[@]} ${PERF_ARGS[@]} 2>&1 | tee log.txt
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "qwen3-0.6B.sh").write_text(MODEL)
    path = tmp_path / "run-qwen3.sh"
    path.write_text(SCRIPT)
    return path


def test_a_script_in_miles_own_style_is_read_whole(script: Path) -> None:
    imported = import_script(script)
    config = imported.config
    assert config.name == "run-qwen3"
    assert config.model.name == "/models/Qwen3-0.6B"
    assert config.data.source == "/data/math.jsonl"
    assert config.data.eval_source == {"aime": "/data/aime.jsonl", "gsm8k": "/data/gsm8k.jsonl"}
    assert (config.data.input_key, config.data.label_key) == ("the prompt", "label")
    assert config.rollout.max_response_len == 2048
    assert config.rollout.stop == ("$END", "a b")
    assert config.reward.name == "math"
    training = config.training
    assert (training.advantage_estimator, training.kl_loss_coef) == ("gspo", 1e-3)
    assert (training.eps_clip, training.eps_clip_high) == (4e-4, 5e-4)
    assert (training.global_batch_size, training.num_trainers) == (128, 2)
    assert (training.weight_decay, training.lr_schedule) == (0.01, "linear")  # Megatron's defaults
    assert config.evaluation.temperature == config.rollout.temperature == 1.0
    assert config.engine.extra == {"log_level": "info"}
    assert config.logging.use_wandb
    assert config.logging.wandb_project == "tests"
    assert not (script.parent / "RUN").exists()


def test_what_a_script_has_and_the_kit_has_not_is_listed_with_the_reason(script: Path) -> None:
    imported = import_script(script)
    assert "architecture" in imported.left_out["--num-layers 28"]
    assert "FSDP2" in imported.left_out["--tensor-model-parallel-size 2"]
    assert "secrets" in imported.left_out["--wandb-key"]
    assert imported.unknown == {
        "--eval-max-responce-len": "Did you mean '--eval-max-response-len'?",
        "--sglang-chunked-prefil-size": "Did you mean '--sglang-chunked-prefill-size'?",
    }
    report = imported.report()
    assert "a condition was not followed" in report
    assert "PERF_ARGS is not set" in report
    assert "WANDB_KEY" not in report


def test_a_model_file_that_is_not_there_is_no_loss(script: Path) -> None:
    (script.parent / "models" / "qwen3-0.6B.sh").unlink()
    assert "MODEL_ARGS come from qwen3-0.6B" in import_script(script).report()


def test_brackets_of_a_subshell_are_no_words_and_quoted_ones_are(tmp_path: Path) -> None:
    flags = "--hf-checkpoint m --n-samples-per-prompt 4 --input-key ')' --label-key \"(\""
    line = f"( cd /x && python3 train.py {flags} )"
    (tmp_path / "run.sh").write_text(f"{line}\r\n", newline="")
    config = import_script(tmp_path / "run.sh").config
    assert (config.data.input_key, config.data.label_key) == (")", "(")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello", "starts no train.py"),
        ("python3 train.py --lr 1e-6", "names no --hf-checkpoint"),
        ("python3 train.py --hf-checkpoint m --lr fast", "--lr is 'fast'"),
        ("python3 train.py --hf-checkpoint m --lr", "--lr has 0 values"),
        (
            "python3 train.py --hf-checkpoint m --rollout-batch-size 4 --n-samples-per-prompt 4 "
            "--global-batch-size 7",
            "cannot be taken over as it is",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_flag(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.sh").write_text(text)
    with pytest.raises(ConfigError, match=message):
        import_script(tmp_path / "run.sh")


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        ("--use-routing-replay", "use_routing_replay"),
        ("--use-rollout-routing-replay", "use_rollout_routing_replay"),
        ("--use-routing-replay --use-rollout-routing-replay", "use_rollout_routing_replay"),
    ],
)
def test_of_both_replays_of_experts_the_engines_counts(
    flags: str, setting: str, tmp_path: Path
) -> None:
    script = tmp_path / "run.sh"
    script.write_text(
        f"python train.py --hf-checkpoint kit/tiny/moe --n-samples-per-prompt 4 {flags}\n"
    )
    training = import_script(script).config.training
    names = ("use_routing_replay", "use_rollout_routing_replay")
    assert [name for name in names if getattr(training, name)] == [setting]


@pytest.mark.parametrize(
    ("flags", "expected", "remarked"),
    [
        ("--lora-rank 0 --target-modules all-linear", None, ""),
        ("--lora-rank 32 --lora-type canonical_lora --target-modules all-linear",
         {"r": 32, "lora_alpha": 16, "target_modules": "all-linear"}, ""),
        ("--lora-rank 4 --target-modules linear_proj,linear_fc2 --lora-dropout 0.1",
         {"r": 4, "target_modules": ("o_proj", "down_proj")}, "drop nothing"),
        ("--lora-rank 4 --target-modules linear_qkv",
         {"target_modules": ("q_proj", "k_proj", "v_proj")}, "each layer has its own"),
        ("--lora-rank 4 --target-modules all-linear --exclude-modules linear_fc1,o_proj "
         "--lora-adapter-path /a/b --lora-type canonical_lora",
         {"target_modules": ("q_proj", "k_proj", "v_proj", "down_proj"), "adapter_path": "/a/b"},
         "all but these"),
    ],
)  # fmt: skip
def test_flags_of_miles_adapters_are_read(
    flags: str, expected: dict[str, object] | None, remarked: str, tmp_path: Path
) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f"python train.py --hf-checkpoint m --n-samples-per-prompt 4 {flags}\n")
    imported = import_script(script)
    lora = imported.config.model.lora
    if expected is None or lora is None:
        assert expected is lora
    else:
        assert lora.model_dump() == lora.model_dump() | expected
    assert (remarked in imported.report()) if remarked else imported.report() == ""


@pytest.mark.parametrize("algorithm", ["eagle", "eagle3"])
def test_a_head_that_drafts_goes_there_and_back(tmp_path: Path, algorithm: str) -> None:
    own = {"algorithm": algorithm, "draft_model": "/a/head", "num_steps": 2, "eagle_topk": 3}
    config = SessionConfig.preset("qwen3-0.6b").replace("engine.speculative", own)
    exported = export_script(config)
    script = exported.script
    assert ("engine.speculative" in exported.notes) == (algorithm == "eagle3")
    assert f"--sglang-speculative-algorithm {algorithm.upper()} " in script.replace("\n", " ")
    assert "--sglang-speculative-draft-model-path /a/head" in script
    (tmp_path / "run.sh").write_text(script)
    back = import_script(tmp_path / "run.sh").config.engine.speculative
    assert back
    assert back.model_dump() == back.model_dump() | own


def test_layers_that_predict_further_tokens_go_there_and_back(tmp_path: Path) -> None:
    config = SessionConfig.preset("qwen3-0.6b").replace("engine.speculative", {"algorithm": "mtp"})
    config = config.replace("training.learning_rate", 2e-6)
    draft = {"learning_rate": 2e-6, "mtp_loss_scaling_factor": 0.3}
    config = config.replace("training.draft", draft)
    exported = export_script(config)
    script = exported.script
    assert "--sglang-speculative-algorithm EAGLE" in script
    assert "--sglang-speculative-num-steps 3" in script
    assert "--sglang-speculative-draft-model-path" not in script
    assert "--train-backend megatron" in script
    for flags in ("--enable-mtp-training", "--mtp-num-layers 1", "--mtp-loss-scaling-factor 0.3"):
        assert flags in script
    assert "training.draft" not in exported.notes
    (tmp_path / "run.sh").write_text(script)
    back = import_script(tmp_path / "run.sh").config
    assert back.engine.speculative
    assert back.training.draft
    assert (back.engine.speculative.algorithm, back.engine.speculative.steps) == ("mtp", 3)
    assert back.training.draft.model_dump() == back.training.draft.model_dump() | draft
    other = config.replace("training.draft.learning_rate", 1e-3)
    assert "learning_rate 0.001" in export_script(other).notes["training.draft"]
    assert "Megatron trainer only" in export_script(config, "fsdp").notes["training.draft"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--enable-mtp-training --sglang-speculative-algorithm EAGLE", "--mtp-num-layers is 0"),
        (
            "--enable-mtp-training --mtp-num-layers 2 --sglang-speculative-algorithm EAGLE",
            "--mtp-num-layers is 2",
        ),
    ],
)
def test_training_of_such_layers_that_is_not_the_kits_is_refused(
    flags: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "run.sh").write_text(f"python train.py --hf-checkpoint m {flags}\n")
    with pytest.raises(ConfigError, match=words):
        import_script(tmp_path / "run.sh")


def test_training_of_a_layer_that_drafts_nothing_is_remarked(tmp_path: Path) -> None:
    flags = "--n-samples-per-prompt 4 --enable-mtp-training --mtp-num-layers 1"
    (tmp_path / "run.sh").write_text(f"python train.py --hf-checkpoint m {flags}\n")
    imported = import_script(tmp_path / "run.sh")
    assert imported.config.training.draft is None
    assert "add --sglang-speculative-algorithm EAGLE" in imported.report()


def test_adapters_go_to_the_trainer_of_miles_that_has_them_and_what_is_lost_is_said() -> None:
    config = SessionConfig.preset("tiny-lora").replace("model.lora.r", 16)
    exported = export_script(config)
    assert "--train-backend megatron" in exported.script
    assert "--lora-rank 16" in exported.script
    assert "model.lora" not in exported.notes
    rank_stabilised = export_script(config.replace("model.lora.use_rslora", True))
    assert "--lora-alpha 64" in rank_stabilised.script
    assert "gives the same factor as use_rslora" in rank_stabilised.notes["model.lora"]
    on_fsdp = export_script(config, "fsdp")
    assert "--lora" not in on_fsdp.script
    assert "trains all weights" in on_fsdp.notes["model.lora"]


def test_the_script_is_the_one_that_was_looked_at_before() -> None:
    config = SessionConfig.preset("qwen3-0.6b-gsm8k")
    for setting, value in {
        "data.source": "data/gsm8k/train.jsonl",
        "data.eval_source": "/data/gsm8k/test.jsonl",
        "training.kl_loss_coef": 0.001,
        "training.advantage_estimator": "rloo",
        "rollout.stop": ["\n\nQuestion:"],
        "checkpoint.interval": 10,
        "logging": {"use_wandb": True, "wandb_group": "it's first"},
        "engine.extra": {"chunked_prefill_size": 4096},
        "memory.device_gib": 24,
    }.items():
        config = config.replace(setting, value)
    script = export_script(config).script
    if os.environ.get("KIT_WRITE_GOLDEN"):
        GOLDEN.write_text(script)
    assert script == GOLDEN.read_text(), "KIT_WRITE_GOLDEN=1 writes it anew"


def test_the_commands_go_there_and_back(tmp_path: Path) -> None:
    script, config = tmp_path / "run.sh", tmp_path / "config.yaml"
    done = CliRunner().invoke(app, ["export", "miles", "qwen3-0.6b", "-o", str(script)])
    assert done.exit_code == 0
    assert os.access(script, os.X_OK)
    assert "data.source: reasoning_gym:gsm_symbolic is no file" in done.output
    assert "`--data FOLDER` writes its rows" in done.output
    done = CliRunner().invoke(app, ["import", "miles", str(script), "-o", str(config)])
    assert done.exit_code == 0
    assert SessionConfig.load(config).training == SessionConfig.preset(
        "qwen3-0.6b"
    ).training.model_copy(update={"max_tokens_per_gpu": 16384})
    assert CliRunner().invoke(app, ["import", "miles", "none.sh"]).exit_code == 2
    assert CliRunner().invoke(app, ["export", "miles", "none.yaml"]).exit_code == 2


def test_prompts_of_any_source_go_along_as_files_with_what_belongs_to_them(tmp_path: Path) -> None:
    config = SessionConfig(
        data={"source": "tiny:addition", "system_prompt": "Add."}, evaluation={"max_prompts": 5}
    )
    config.dump(tmp_path / "config.yaml")
    script, folder = tmp_path / "run.sh", tmp_path / "data"
    words = [str(tmp_path / "config.yaml"), "-o", str(script), "--data", str(folder)]
    done = CliRunner().invoke(app, ["export", "miles", *words])
    assert done.exit_code == 0, done.output
    assert "data." not in done.output.replace("Written", "")
    assert "evaluation" not in done.output
    held_out = [json.loads(line) for line in (folder / "held_out.jsonl").open()]
    assert len(held_out) == 5
    assert [message["role"] for message in held_out[0]["prompt"]] == ["system", "user"]
    assert held_out[0]["label"]
    back = import_script(script).config
    assert back.data.source == str(folder / "train.jsonl")
    assert (back.reward.name, back.data.system_prompt) == ("exact", "")
    assert back.rollout.max_response_len == 8


def test_several_held_out_sets_go_along_by_name(tmp_path: Path) -> None:
    sets = {"chain": "tiny:chain", "two digits": "tiny:addition@[:7]"}
    config = SessionConfig(data={"source": "tiny:addition", "eval_source": sets})
    config.dump(tmp_path / "config.yaml")
    script, folder = tmp_path / "run.sh", tmp_path / "data"
    words = [str(tmp_path / "config.yaml"), "-o", str(script), "--data", str(folder)]
    done = CliRunner().invoke(app, ["export", "miles", *words])
    assert done.exit_code == 0, done.output
    back = import_script(script).config
    files = {n: folder / f"held_out-{n.replace(' ', '_')}.jsonl" for n in sets}
    assert back.data.eval_source == {name: str(file) for name, file in files.items()}
    assert len(files["two digits"].read_text().splitlines()) == 7


def test_the_rewards_grade_as_miles_calls_them() -> None:
    right, wrong = (
        Sample(prompt="q", response=text, label="#### 7") for text in ("so #### 7", "#### 8")
    )
    assert asyncio.run(miles_rewards.gsm8k(None, right)) == 1.0
    assert asyncio.run(miles_rewards.gsm8k(None, [right, wrong], unused=1)) == [1.0, 0.0]
    from kit.rewards import BUILT_IN

    assert all(hasattr(miles_rewards, name) for name in BUILT_IN)


def test_the_page_is_up_to_date() -> None:
    maker = Path(__file__).parents[2] / "docs" / "make_miles_page.py"
    made = runpy.run_path(str(maker))
    assert made["PAGE"].read_text() == made["page"](), "run `python docs/make_miles_page.py`"
