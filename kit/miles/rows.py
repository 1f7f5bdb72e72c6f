"""`write_rows`: prompts of any source as the JSONL files that Miles reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit.config import DataConfig, SessionConfig
from kit.data.prompts import PromptRow
from kit.data.sources import Split, load_prompts
from kit.errors import DataError

FILES: dict[Split, str] = {"train": "train.jsonl", "eval": "held_out.jsonl"}


def write_rows(config: SessionConfig, folder: Path) -> SessionConfig:
    """Write training and held-out prompts, and return settings that read them from there.

    What belongs to the rows goes along: the system prompt, how many held-out ones there are, and
    the reward and length that the task asks for where the settings leave them open.

    Raises DataError where the prompts cannot be read or the files not be written.
    """
    data = config.data
    sources = {}
    for split, name in FILES.items():
        prompts = load_prompts(data, split=split, model_name=config.model.name, seed=config.seed)
        if prompts is None:
            continue
        rows = prompts.rows[: config.evaluation.max_prompts] if split == "eval" else prompts.rows
        lines = [json.dumps(_row(row, data), ensure_ascii=False) + "\n" for row in rows]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{folder / name} cannot be written.", why=str(error)) from None
        sources[split] = str(folder / name)
        if split == "train":
            needed = prompts.default_reward, prompts.max_response_len
    tree = config.model_dump()
    tree["data"] = {
        "source": sources["train"],
        "eval_source": sources.get("eval", ""),
        "apply_chat_template": data.apply_chat_template,
        "shuffle": data.shuffle,
    }
    tree["evaluation"]["max_prompts"] = None
    if not config.reward.name and not config.reward.weights:
        tree["reward"]["name"] = needed[0]
    if config.rollout.max_response_len is None:
        tree["rollout"]["max_response_len"] = needed[1]
    return SessionConfig(**tree)


def _row(row: PromptRow, data: DataConfig) -> dict[str, Any]:
    prompt: Any = row.prompt
    if isinstance(prompt, str) and data.system_prompt:
        system = {"role": "system", "content": data.system_prompt}
        prompt = [system, {"role": "user", "content": prompt}]
    return {"prompt": prompt, "label": row.label, "metadata": row.metadata}
