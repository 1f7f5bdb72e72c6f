"""Where a model's files are: the embedded one, a directory, or a Hugging Face name."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from kit.config import TINY, ModelConfig
from kit.errors import ConfigError, ModelError

TINY_DIRECTORY = Path(__file__).resolve().parents[1] / "tiny" / "model"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model directory, and what its config.json says that a session needs."""

    path: str
    context_length: int
    architecture: str
    bytes: int
    """Size of its weight files."""


def find(config: ModelConfig) -> ModelSource:
    """Find the model and read its config.json; downloads a hub model that is not cached.

    Raises:
        ModelError: it is not there, or not a model directory.
        ConfigError: `context_length` is more than the model can.
    """
    path = TINY_DIRECTORY if config.name == TINY else _directory(config.name)
    file = path / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        limit = int(settings["max_position_embeddings"])
        architecture = str(settings["architectures"][0])
    except FileNotFoundError:
        raise ModelError(
            f"{path} has no config.json, so it is no Hugging Face model directory.",
            fix="point model.name at the directory that holds config.json and the safetensors.",
        ) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(
            f"{file} does not describe a language model: {type(error).__name__} {error}."
        ) from error
    if config.context_length and config.context_length > limit:
        raise ConfigError(
            f"model.context_length is {config.context_length}, but {config.name} holds {limit} "
            f"tokens.",
            fix=f"set model.context_length to {limit} or less.",
        )
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return ModelSource(str(path), config.context_length or limit, architecture, size)


def _directory(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    if os.sep in name:
        raise ModelError(
            f"There is no model directory {str(path.absolute())!r}.",
            fix="check model.name: a directory, a Hugging Face name such as Qwen/Qwen3-0.6B, or "
            "tiny.",
        )
    hint = "Did you mean 'tiny'? " if difflib.get_close_matches(name, [TINY]) else ""
    raise ModelError(
        f"There is no model {name!r}.",
        fix=f"{hint}model.name is a directory, a Hugging Face name such as Qwen/Qwen3-0.6B, or "
        f"tiny (the model that ships with the kit).",
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"The model {name!r} is no directory here, is not in the local cache, and cannot be "
            f"downloaded.",
            why=str(error).splitlines()[0],
            fix="connect to the network once, or download the model on another machine, copy the "
            "directory here and set model.name to its path.",
        ) from error
