"""`export_script`: the launch script of Miles for a configuration of the kit.

`write_rows` writes prompts of any source as the JSONL files that Miles reads.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kit.config import DataConfig, SessionConfig
from kit.data.prompts import PromptRow
from kit.data.sources import eval_sources, load_held_out, load_prompts
from kit.errors import DataError
from kit.miles.flags import NOT_PASSED
from kit.miles.links import CKPT, FSDP, GROUPS, MEGATRON, PERF, SGLANG, Variable, get, is_flag
from kit.miles.links_rollout import is_file
from kit.miles.table import LINKS
from kit.models.source import DIRECTORIES

WITHOUT = {
    "name": "",  # only a label
    "device": "Miles runs on GPUs, and cpu is none",
    "model.quantization": "Miles' Megatron trainer does this for a model that `kit quantize` wrote "
    "(--fp8-format e4m3 --fp8-recipe blockwise); the script trains plain weights",
    "model": "Miles takes what its trainer does",
    "data.system_prompt": "it belongs into the rows; `--data FOLDER` puts it there",
    "data.filter_overlong_prompts": "--rollout-max-prompt-len leaves out longer prompts",
    "data.add_bos_token": "write it into the rows, or into tokenizer_config.json",
    "data": "Miles reads files only; `--data FOLDER` writes them",
    "reward.weights": "write a function of your own for --custom-rm-path",
    "reward.format_pattern": "put it into each row's metadata, as format_pattern",
    "reward": "Miles waits for rewards as long as they take",
    "rollout.include_stop_str_in_output": "Miles keeps the string in any case",
    "rollout": "Miles draws until the batch is full",
    "training.mis": "its example mis.py does this: --use-tis --custom-tis-function-path",
    "training.optimizer": "Miles' Adam keeps its moments in float32",
    "cluster": "the script starts Ray on one machine, or joins what runs there",
    "engine.replicas": "Miles starts an engine on each GPU of the job",
    "engine.lora": "Miles has SGLang's own adapters, and merges none",
    "engine.max_loras_per_batch": "Miles has one adapter",
    "engine.quantization": "name a directory that `kit quantize` wrote in --hf-checkpoint",
    "engine.weight_bits": "Miles hands the weights over as they are",
    "engine.weight_noise": "Miles hands the weights over as they are",
    "engine": "Miles has limits of its own",
    "memory": "Miles has no memory plan; --sglang-mem-fraction-static shares a card",
    "evaluation": "name a slice of the file, such as held_out.jsonl@[0:512]",
    "checkpoint": "Miles keeps every checkpoint",
    "mismatch": "Miles logs train/train_rollout_logprob_abs_diff at every step",
    "logging": "set it where Miles runs",
    "stack": "a job of Miles ends with its script",
}
"""Why there is no flag, by the setting or its section."""

_MODEL_FILES = ("0.6B", "1.7B", "4B-Instruct-2507", "32B", "30B-A3B", "235B-A22B-2507")
"""Qwen3 models that Miles has under `scripts/models/`."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A launch script, and the settings that it could not carry over."""

    script: str
    notes: dict[str, str]
    """Why a setting is not carried over as it is, by its name."""


def export_script(config: SessionConfig, backend: str | None = None) -> Exported:
    """Write the launch script.

    Args:
        config: the settings.
        backend: Miles' trainer: `fsdp`, which is the kit's own kind, or `megatron`. None takes
            fsdp, and megatron for ppo, for adapters, and for training layers of the model that
            predict further tokens, which the other has not.
    """
    is_ppo = config.training.advantage_estimator == "ppo"
    drafts = config.engine.speculative
    trains_mtp = bool(config.training.draft and drafts and drafts.algorithm == "mtp")
    needs_megatron = is_ppo or config.model.lora or trains_mtp
    backend = backend or (MEGATRON if needs_megatron else FSDP)
    notes = {link.setting: link.note(config, backend) for link in LINKS}
    notes = {setting: why for setting, why in notes.items() if why}
    if is_ppo and backend == FSDP:
        notes["training.advantage_estimator"] = "ppo needs Miles' Megatron trainer"
    if is_ppo and config.training.kl_coef:
        notes["training.kl_coef"] = "with ppo Miles takes --use-kl-loss only"
    notes |= _without(config)
    arrays = _arrays(config, backend, notes)
    parts = [
        _head(config, notes),
        _variables(config, has_reference=config.training.has_reference or backend == MEGATRON),
        *arrays.values(),
        _launch(config, backend, [f"{group}_ARGS" for group in arrays]),
    ]
    return Exported("\n\n".join(parts) + "\n", notes)


def settings_of(section: type[BaseModel] = SessionConfig, before: str = "") -> list[str]:
    """All settings by dotted name, such as `training.learning_rate`."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += settings_of(kind, f"{before}{name}.")
        else:
            names.append(before + name)
    return names


def reason(setting: str) -> str:
    """Reason why a setting has no flag."""
    parts = setting.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((WITHOUT[name] for name in names if name in WITHOUT), "Miles has nothing like it")


def _without(config: SessionConfig) -> dict[str, str]:
    """Changed settings that have no flag, and why."""
    linked = {link.setting for link in LINKS}
    defaults = SessionConfig()
    notes = {}
    for setting in settings_of():
        if setting in linked or setting in ("name", "engine.extra"):
            continue
        if get(config, setting) not in (get(defaults, setting), "cuda"):
            notes[setting] = f"{reason(setting)} (here {_plain(get(config, setting))})"
    if left := [key for key, found in config.engine.extra.items() if not _passes(key, found)]:
        notes["engine.extra"] = f"{', '.join(left)}: Miles sets it itself, or cannot say it"
    return notes


def _head(config: SessionConfig, notes: dict[str, str]) -> str:
    lines = [
        "#!/usr/bin/env bash",
        f"# The settings of {_plain(config.name)!r} for Miles, written by `kit export miles`.",
        "# Run it where Miles is installed, in its own image as a rule.",
    ]
    linked = {link.setting for link in LINKS}
    lost = [f"#   {setting}: {why}" for setting, why in notes.items() if setting not in linked]
    if lost:
        lines += ["#", "# Settings without a counterpart:", *lost]
    return "\n".join([*lines, "set -euo pipefail"])


def _variables(config: SessionConfig, *, has_reference: bool) -> str:
    """Lines at the top of the script that set what depends on the machine."""
    source = config.data.source
    model = str(DIRECTORIES.get(config.model.name, config.model.name))
    lines = [
        'MILES_DIR="${MILES_DIR:-/root/miles}"',
        f"NUM_GPUS={config.training.num_trainers}",
        f"MODEL={shlex.quote(model)}",
        f"PROMPT_DATA={_place(source if is_file(source) else 'train.jsonl')}",
    ]
    for number, held_out in enumerate(_held_out_places(config)):
        lines.append(f"EVAL_DATA{number or ''}={_place(held_out)}")
    if config.checkpoint.interval:
        lines.append(f"SAVE={_place('outputs/checkpoints')}")
    if has_reference:
        lines += [
            "",
            'if [[ ! -d "$MODEL" ]]; then  # --ref-load has to be a directory',
            '   MODEL="$(hf download --quiet "$MODEL")"',
            "fi",
        ]
    return "\n".join(lines)


def _place(path: str) -> str:
    """Quote a path for the shell; a relative one starts where the script is called."""
    return shlex.quote(path) if path.startswith("/") else f'"$PWD"/{shlex.quote(path)}'


def _arrays(config: SessionConfig, backend: str, notes: dict[str, str]) -> dict[str, str]:
    arrays = {}
    for group in GROUPS:
        lines = _fixed(config, backend, group)
        for link in LINKS:
            if link.group != group:
                continue
            if link.setting == "reward.name" and "--custom-rm-path" in link.write(config, backend):
                lines.append("# needs the kit where Miles runs: pip install --no-deps its folder")
            if why := notes.get(link.setting):
                lines.append(f"# {link.setting}: {why}")
            lines += _lines(link.write(config, backend))
        lines += _extra(config) if group == SGLANG else []
        if lines:
            body = "\n".join(f"   {line}" for line in lines)
            arrays[group] = f"{group}_ARGS=(\n{body}\n)"
    return arrays


def _fixed(config: SessionConfig, backend: str, group: str) -> list[str]:
    """Flags for how the kit always works, whatever its settings are."""
    has_reference = config.training.has_reference or backend == MEGATRON
    if group == CKPT:
        lines = [f"--train-backend {backend}"]
        lines += ["--megatron-to-hf-mode bridge"] if backend == MEGATRON else []
        return [*lines, '--ref-load "$MODEL"'] if has_reference else lines
    if group == PERF:
        lines = ['--num-gpus-per-node "$NUM_GPUS"', "--optimizer adam"]
        if backend == MEGATRON:
            lines += ["--attention-dropout 0.0", "--hidden-dropout 0.0"]
            lines += ["--accumulate-allreduce-grads-in-fp32", "--attention-softmax-in-fp32"]
            lines += ["--attention-backend flash"]
        return lines
    return []


def _lines(words: list[str]) -> list[str]:
    """Format flags, one per line."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--"):
            lines.append(word)
        else:
            quoted = f'"{word}"' if isinstance(word, Variable) else shlex.quote(word)
            lines[-1] += f" {quoted}"
    return lines


def _extra(config: SessionConfig) -> list[str]:
    words: list[str] = []
    for key, found in config.engine.extra.items():
        if _passes(key, found):
            values = found if isinstance(found, (list, tuple)) else [found]
            words.append(f"--sglang-{key.replace('_', '-')}")
            words += [] if found is True else [str(one) for one in values]
    return _lines(words)


def _passes(key: str, found: Any) -> bool:
    """Whether a field of `engine.extra` can be given as a flag of SGLang's, with Miles' prefix."""
    values = found if isinstance(found, (list, tuple)) and found else [found]
    simple = all(isinstance(one, (str, int, float)) for one in values) and found is not False
    return key not in NOT_PASSED and simple and not any(map(is_flag, values))


def _launch(config: SessionConfig, backend: str, arrays: list[str]) -> str:
    lines = []
    if backend == MEGATRON:
        lines += [*_architecture(config.model.name), ""]
        arrays = ["MODEL_ARGS", *arrays]
    lines += [
        "# A cluster that runs already is joined: leave this line out.",
        'ray start --head --num-gpus "$NUM_GPUS" --disable-usage-stats',
        "",
        'ray job submit --address="http://127.0.0.1:8265" \\',
        '   --runtime-env-json=\'{"env_vars": {"PYTHONPATH": "/root/Megatron-LM/", '
        '"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}\' \\',
        '   -- python3 "$MILES_DIR/train.py" \\',
        " \\\n".join(f'   "${{{array}[@]}}"' for array in arrays),
    ]
    return "\n".join(lines)


def _architecture(model: str) -> list[str]:
    """Flags that describe the model's architecture, which Megatron asks for."""
    size = next((s for s in _MODEL_FILES if model.lower().endswith(f"qwen3-{s}".lower())), None)
    if size:
        return [f'source "$MILES_DIR/scripts/models/qwen3-{size}.sh"']
    return [
        "# Miles describes models in scripts/models/*.sh, as an array MODEL_ARGS: name yours here.",
        'source "$MILES_DIR/scripts/models/${MODEL_FILE:?the file for your model}"',
    ]


def _plain(value: object) -> str:
    """Format a value for one line of a comment."""
    return " ".join(str(value).split())[:120]


def _held_out_places(config: SessionConfig) -> list[str]:
    """File of each held-out set, there or to be made; none where nothing is evaluated."""
    if not config.data.eval_source and not config.evaluation.interval:
        return []
    sources = {n: str(each.eval_source) for n, each in eval_sources(config.data).items()}
    return [source if is_file(source) else _held_out(name) for name, source in sources.items()]


def _held_out(name: str) -> str:
    """Name of the file for a held-out set; the only one has no name of its own."""
    return f"held_out-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.jsonl" if name else "held_out.jsonl"


def write_rows(config: SessionConfig, folder: Path) -> SessionConfig:
    """Write training and held-out prompts, and return settings that read them from there.

    The returned settings also take over the system prompt, the number of held-out prompts, and the
    task's own reward and response length where the settings leave them open.

    Raises DataError if prompts cannot be read or files not written.
    """
    data, model = config.data, config.model.name
    prompts = load_prompts(data, split="train", model_name=model, seed=config.seed)
    held_out = load_held_out(data, model_name=model, seed=config.seed)
    names = list(eval_sources(data))
    train = _write_rows(prompts, folder / "train.jsonl", data)
    sources = {
        name: _write_rows(each[: config.evaluation.max_prompts], folder / _held_out(name), data)
        for name, each in zip(names, held_out, strict=False)
    }
    tree = config.model_dump()
    tree["data"] = {
        "source": train,
        "eval_source": sources.get("", sources or ""),
        "apply_chat_template": data.apply_chat_template,
        "chat_template_kwargs": data.chat_template_kwargs,
        "shuffle": data.shuffle,
    }
    tree["evaluation"]["max_prompts"] = None
    if not config.reward.name and not config.reward.weights:
        tree["reward"]["name"] = prompts.default_reward
    if config.rollout.max_response_len is None:
        tree["rollout"]["max_response_len"] = prompts.max_response_len
    return SessionConfig(**tree)


def _write_rows(rows: Sequence[PromptRow], file: Path, data: DataConfig) -> str:
    lines = [json.dumps(_row(row, data), ensure_ascii=False) + "\n" for row in rows]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file} cannot be written.", why=str(error)) from None
    return str(file)


def _row(row: PromptRow, data: DataConfig) -> dict[str, Any]:
    prompt: Any = row.prompt
    if isinstance(prompt, str) and data.system_prompt:
        system = {"role": "system", "content": data.system_prompt}
        prompt = [system, {"role": "user", "content": prompt}]
    return {"prompt": prompt, "label": row.label, "metadata": row.metadata}
