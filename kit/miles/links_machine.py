"""Links of optimizer, memory, engine and loggers."""

from __future__ import annotations

from kit.config import SessionConfig
from kit.miles.links import (
    FSDP,
    LOG,
    OPTIMIZER,
    PERF,
    READ_AS_FLAG,
    SGLANG,
    Given,
    Link,
    Variable,
    Words,
    get,
    is_flag,
    switch,
    value,
    words_if,
)

MICRO_BATCH = 16384
"""What the kit takes where the size of a micro-batch is left open."""
DECAYS = ("constant", "linear", "cosine")


def _by_backend(setting: str, flag: str, fsdp: float, megatron: float) -> Link:
    """Link of a number whose default depends on Miles' trainer; always written."""
    return Link(
        setting,
        (flag,),
        OPTIMIZER,
        lambda config, backend: [flag, str(get(config, setting))],
        lambda given: given.number(flag, fsdp if given.backend == FSDP else megatron),
        default=str(fsdp) if fsdp == megatron else f"{fsdp}, Megatron's {megatron}",
    )


def _read_decay(given: Given) -> str:
    style = given.text("--lr-decay-style", "constant" if given.backend == FSDP else "linear")
    if style in DECAYS:
        return style
    given.remarks.append(f"--lr-decay-style {style} has no counterpart; constant is taken")
    return "constant"


def _write_recompute(config: SessionConfig, backend: str) -> Words:
    wanted = config.model.gradient_checkpointing
    if backend == FSDP:
        if wanted is None:
            return []
        return ["--gradient-checkpointing" if wanted else "--no-gradient-checkpointing"]
    if wanted is True:
        full = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        return [*full, "--recompute-num-layers", "1"]
    return words_if(wanted, "--recompute-granularity", "selective")


def _read_recompute(given: Given) -> bool | str | None:
    kind = given.text("--recompute-granularity", "")
    if given.has("--gradient-checkpointing") or kind == "full":
        return True
    if kind == "selective":
        return "selective"
    return False if given.has("--no-gradient-checkpointing") else None


def _recompute_note(config: SessionConfig, backend: str) -> str:
    wanted = config.model.gradient_checkpointing
    if backend == FSDP and isinstance(wanted, str):
        return f"{wanted}: Miles' FSDP trainer recomputes whole layers or nothing"
    if wanted == "alternating":
        return "alternating: selective is the nearest"
    return "false: this is Megatron's default" if backend != FSDP and wanted is False else ""


def _write_offload(config: SessionConfig, backend: str) -> Words:
    wanted = config.training.optimizer_cpu_offload
    if backend == FSDP and wanted is not None:
        return ["--fsdp-cpu-offload" if wanted else "--no-fsdp-cpu-offload"]
    return words_if(wanted, "--optimizer-cpu-offload")


def _read_offload(given: Given) -> bool | None:
    if given.has("--fsdp-cpu-offload") or given.has("--optimizer-cpu-offload"):
        return True
    return False if given.has("--no-fsdp-cpu-offload") else None


def _offload_note(config: SessionConfig, backend: str) -> str:
    is_off = config.training.optimizer_cpu_offload is False
    return "false: this is Megatron's default" if is_off and backend != FSDP else ""


_SLEEP = {
    "auto": [],
    "always": ["--offload"],
    "never": ["--no-offload-train", "--no-offload-rollout"],
}


def _read_sleep(given: Given) -> str:
    if given.has("--offload") or (given.has("--offload-train") and given.has("--offload-rollout")):
        return "always"
    kept = given.has("--no-offload-train") and given.has("--no-offload-rollout")
    return "never" if kept else "auto"


def _write_colocate(config: SessionConfig, backend: str) -> Words:
    if config.cluster.colocate:
        return ["--colocate"]
    gpus = (config.engine.replicas or 1) * config.engine.tensor_parallel
    return ["--rollout-num-gpus", str(gpus)]


def _write_data_parallel(config: SessionConfig, backend: str) -> Words:
    parts = config.engine.data_parallel
    flags = ("--sglang-data-parallel-size", parts, "--sglang-enable-dp-attention")
    return words_if(parts > 1, *flags)


def _write_group(config: SessionConfig, backend: str) -> Words:
    group = config.logging.wandb_group or (config.name if config.logging.use_wandb else "")
    flags = ("--wandb-group", group, "--disable-wandb-random-suffix")
    return words_if(group and not is_flag(group), *flags)


def _group_note(config: SessionConfig, backend: str) -> str:
    group = config.logging.wandb_group
    if is_flag(group):
        return f"{group} {READ_AS_FLAG}"
    return "left open it is the session's name" if config.logging.use_wandb and not group else ""


MACHINE = [
    value("training.learning_rate", "--lr", OPTIMIZER, 1e-6, explicit=True),
    Link(
        "training.lr_schedule",
        ("--lr-decay-style",),
        OPTIMIZER,
        lambda c, backend: ["--lr-decay-style", c.training.lr_schedule],
        _read_decay,
        default="constant, Megatron's linear",
    ),
    value("training.warmup_steps", "--lr-warmup-iters", OPTIMIZER, 0),
    value("training.min_learning_rate", "--min-lr", OPTIMIZER, 0.0),
    _by_backend("training.adam_beta1", "--adam-beta1", 0.9, 0.9),
    _by_backend("training.adam_beta2", "--adam-beta2", 0.95, 0.999),
    value("training.adam_eps", "--adam-eps", OPTIMIZER, 1e-8),
    _by_backend("training.weight_decay", "--weight-decay", 0.0, 0.01),
    value("training.clip_grad", "--clip-grad", OPTIMIZER, 1.0),
    Link(
        "training.num_trainers",
        ("--actor-num-gpus-per-node", "--actor-num-nodes"),
        PERF,
        lambda c, backend: (
            ["--actor-num-nodes", "1", "--actor-num-gpus-per-node", Variable("$NUM_GPUS")]
        ),
        lambda given: (
            given.whole("--actor-num-nodes", 1) * given.whole("--actor-num-gpus-per-node", 8)
        ),
        default="8, 1",
    ),
    Link(
        "training.max_tokens_per_gpu",
        ("--max-tokens-per-gpu", "--use-dynamic-batch-size"),
        PERF,
        lambda c, backend: [
            "--use-dynamic-batch-size",
            "--max-tokens-per-gpu",
            str(c.training.max_tokens_per_gpu or MICRO_BATCH),
        ],
        lambda given: given.whole("--max-tokens-per-gpu", None),
        lambda c, backend: (
            "" if c.training.max_tokens_per_gpu else f"left open it is {MICRO_BATCH}"
        ),
        "none, off",
    ),
    Link(
        "model.gradient_checkpointing",
        (
            "--gradient-checkpointing",
            "--no-gradient-checkpointing",
            "--recompute-granularity",
            "--recompute-method",
            "--recompute-num-layers",
        ),
        PERF,
        _write_recompute,
        _read_recompute,
        _recompute_note,
        "off",
        "`null`: the kit's memory plan chooses",
    ),
    Link(
        "training.optimizer_cpu_offload",
        ("--fsdp-cpu-offload", "--no-fsdp-cpu-offload", "--optimizer-cpu-offload"),
        PERF,
        _write_offload,
        _read_offload,
        _offload_note,
        "off",
        "`null`: the kit's memory plan chooses",
    ),
    Link(
        "memory.sleep",
        (
            "--offload",
            "--offload-train",
            "--offload-rollout",
            "--no-offload-train",
            "--no-offload-rollout",
        ),
        PERF,
        lambda c, backend: _SLEEP[c.memory.sleep],
        _read_sleep,
        default="on with --colocate",
        remark="`auto` is no flag",
    ),
    value("engine.update_weight_buffer_size", "--update-weight-buffer-size", PERF, 512 << 20),
    Link(
        "cluster.colocate",
        ("--colocate", "--rollout-num-gpus"),
        PERF,
        _write_colocate,
        lambda given: given.has("--colocate"),
        default="off",
        remark="apart, Miles wants to know how many GPUs the engines have",
    ),
    value("engine.tensor_parallel", "--rollout-num-gpus-per-engine", SGLANG, 1, explicit=True),
    Link(
        "engine.data_parallel",
        ("--sglang-data-parallel-size", "--sglang-enable-dp-attention"),
        SGLANG,
        _write_data_parallel,
        lambda given: given.whole("--sglang-data-parallel-size", 1),
        default="1",
    ),
    value("engine.mem_fraction_static", "--sglang-mem-fraction-static", SGLANG, None),
    value("engine.max_total_tokens", "--sglang-max-total-tokens", SGLANG, None),
    value("engine.max_running_requests", "--sglang-max-running-requests", SGLANG, None),
    value("engine.attention_backend", "--sglang-attention-backend", SGLANG, None, absent="auto"),
    value("engine.kv_cache_dtype", "--sglang-kv-cache-dtype", SGLANG, None, absent="auto"),
]

LOGGING = [
    switch("logging.use_wandb", "--use-wandb", LOG),
    value("logging.wandb_mode", "--wandb-mode", LOG, None),
    value("logging.dir", "--wandb-dir", LOG, None, absent=""),
    value("logging.wandb_project", "--wandb-project", LOG, None, absent="kit"),
    value("logging.wandb_team", "--wandb-team", LOG, None, absent=""),
    Link(
        "logging.wandb_group",
        ("--wandb-group", "--disable-wandb-random-suffix"),
        LOG,
        _write_group,
        lambda given: given.text("--wandb-group", ""),
        _group_note,
        "none",
        "Miles adds random letters unless told not to",
    ),
    value("logging.wandb_run_id", "--wandb-run-id", LOG, None, absent=""),
    value("logging.wandb_host", "--wandb-host", LOG, None, absent=""),
    switch("logging.wandb_always_use_train_step", "--wandb-always-use-train-step", LOG),
    switch("logging.use_tensorboard", "--use-tensorboard", LOG),
    value("logging.tb_project_name", "--tb-project-name", LOG, None, absent=""),
    value("logging.tb_experiment_name", "--tb-experiment-name", LOG, None, absent=""),
]
