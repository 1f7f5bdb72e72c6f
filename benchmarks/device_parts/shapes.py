"""The models' shapes, and their directories: random weights, written once.

    python -m benchmarks.device_parts.shapes FOLDER DEVICE 4b 0.6b

Weights are made on the device in bfloat16, which costs what real ones cost.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.card import TOKENIZER_FILES
from benchmarks.gpu_parts.workload import QWEN3_06B

QWEN3_4B: dict[str, Any] = QWEN3_06B | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
"""The exact shape of Qwen3-4B."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, and the batch that it is measured with."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    """Of Qwen3; empty for the embedded model, which is there already."""
    prompts: int = 32
    group: int = 8
    prompt_tokens: int = 64
    response_tokens: int = 512
    least_seconds: float = 60.0
    """A row is not begun with less time left."""

    def folder(self, models: Path) -> str:
        """What `model.name` is set to."""
        return str(models / self.name) if self.config else self.name


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("4b", QWEN3_4B, least_seconds=90.0),
        Shape("0.6b", QWEN3_06B),
        Shape("tiny", group=4, prompt_tokens=16, response_tokens=12, least_seconds=15.0),
    )
}
"""By name, the most telling first."""


def write(shape: Shape, folder: Path, device: str) -> None:
    """Write a model directory, complete or not at all; one that is there is left as it is."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from kit.models.source import TINY_DIRECTORY

    if folder.is_dir():
        return
    begin, partial = time.perf_counter(), folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(0)
    config = Qwen3Config(**shape.config, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(partial)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY_DIRECTORY / name, partial)
    partial.rename(folder)
    print(f"wrote {shape.name} in {time.perf_counter() - begin:.1f} s", flush=True)


def main(arguments: list[str]) -> None:
    """Write the directories that are named and missing."""
    folder, device, *names = arguments
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        write(SHAPES[name], Path(SHAPES[name].folder(Path(folder))), device)


if __name__ == "__main__":
    main(sys.argv[1:])
