"""`session.export_hf`: the model as a directory that Transformers, SGLang and the hub know."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kit.checkpoint import manifest
from kit.errors import CheckpointError
from kit.utils.files import put_in_place
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.lifecycle.start import Lifecycle
    from kit.stack.stack import Stack


Dtype = Literal["float32", "bfloat16"]


BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
)
"""Files of a model directory that training does not change."""


def export_hf(
    session: Lifecycle, stack: Stack, path: str | Path | None, dtype: Dtype | None
) -> Path:
    """Write the directory and return where it is. Raises CheckpointError where it cannot be."""
    from kit.checkpoint.checkpoint import own_folder

    name = f"{session.config.name}-step-{session.step_count:06d}-hf"
    target = (Path(path) if path is not None else own_folder(session) / name).absolute()
    if target.exists() and manifest.kind_of(target) != "export":
        raise CheckpointError(
            f"{target} is there already and is no export.",
            fix="name a directory that does not exist yet.",
        )
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        wanted = dtype or stack.dtype
        with held():  # trainers that nobody waits for would write on into a folder that goes away
            stack.export_hf(str(partial), wanted)
        _copy_beside(Path(stack.model.path), partial, wanted)
        facts = {
            "session": session.config.name,
            "step": session.step_count,
            "weight_version": session.weight_version,
            "made_from": session.config.model.name,
            "dtype": wanted,
        }
        manifest.seal(partial, "export", facts)
        with held():
            put_in_place(partial, target)
    except OSError as error:
        raise CheckpointError(
            f"The export {target} cannot be written.",
            why=str(error),
            fix="free space or name another directory; the session is unchanged.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _copy_beside(model: Path, folder: Path, dtype: str) -> None:
    for pattern in BESIDE:
        for file in model.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the older name
    (folder / "config.json").write_text(
        json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8"
    )
