"""`ModelShape`: the sizes of a model that its memory depends on, read without loading it."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kit.errors import ModelError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes from config.json; the number of parameters from the weight files' own headers."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    """Of the feed-forward part; of all experts that one token sees, where there are experts."""
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    """Is the output embedding the input embedding?"""

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Of the model in a directory that has config.json and safetensors.

        Raises:
            ModelError: it has no safetensors, or they or config.json cannot be read.
        """
        folder = Path(directory)
        try:
            return cls._of(json.loads((folder / "config.json").read_text("utf-8")), folder)
        except (KeyError, TypeError, ValueError, OSError, struct.error) as error:
            raise ModelError(
                f"The sizes of the model in {str(folder)!r} cannot be read.",
                why=f"{type(error).__name__}: {error}",
                fix="give a directory with config.json and safetensors of a causal language model.",
            ) from error

    @classmethod
    def _of(cls, config: dict[str, Any], folder: Path) -> Self:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        wide = int(config.get("intermediate_size", 4 * hidden))
        if experts := config.get("num_experts_per_tok"):
            wide = int(config.get("moe_intermediate_size", wide)) * int(experts)
        tied = bool(config.get("tie_word_embeddings", False))
        files = _weight_files(folder)
        if not files:
            raise FileNotFoundError("there are no *.safetensors")
        stored = {name: size for file in files for name, size in stored_parameters(file).items()}
        if tied and len(stored) > 1:
            # Some files hold it all the same, as the copy of the input embedding that it is.
            stored.pop("lm_head.weight", None)
        return cls(
            parameters=sum(stored.values()),
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=wide,
            heads=heads,
            key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=tied,
        )

    @property
    def matrix_parameters(self) -> int:
        """Parameters that each token is multiplied with: all but the input embedding."""
        embedding = self.vocabulary * self.hidden
        return self.parameters if self.tied else self.parameters - embedding

    def key_value_bytes(self, width: int) -> int:
        """Of one token in the KV cache, at so many bytes a number."""
        return 2 * self.layers * self.key_value_heads * self.head_size * width


def _weight_files(folder: Path) -> list[Path]:
    """Those that a model is loaded from: directories may hold a second copy in other names."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if index.is_file():
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return sorted(folder.glob("*.safetensors"))


def stored_parameters(file: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file holds; reads its header only."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is no safetensors file, or not a whole one")
        header = json.loads(opened.read(length))
    return {
        name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
    }
