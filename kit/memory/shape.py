"""`ModelShape`: the sizes of a model that its memory depends on, read without loading it."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


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
        """Of the model in a directory that has config.json and safetensors."""
        folder = Path(directory)
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        wide = int(config.get("intermediate_size", 4 * hidden))
        if experts := config.get("num_experts_per_tok"):
            wide = int(config.get("moe_intermediate_size", wide)) * int(experts)
        return cls(
            parameters=sum(map(stored_parameters, sorted(folder.glob("*.safetensors")))),
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=wide,
            heads=heads,
            key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def matrix_parameters(self) -> int:
        """Parameters that each token is multiplied with: all but the input embedding."""
        embedding = self.vocabulary * self.hidden
        return self.parameters if self.tied else self.parameters - embedding

    def key_value_bytes(self, width: int) -> int:
        """Of one token in the KV cache, at so many bytes a number."""
        return 2 * self.layers * self.key_value_heads * self.head_size * width


def stored_parameters(file: Path) -> int:
    """How many numbers a safetensors file holds; reads its header only."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return sum(
        math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
    )
