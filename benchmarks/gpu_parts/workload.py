"""`Workload`: what is measured. One shape for a GPU, a tiny one to try the benchmark itself."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, field
from typing import Any, Self

from kit import SessionConfig

QWEN3_06B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
"""The exact shape of Qwen3-0.6B; its weights are random, which costs the same."""
TINY: dict[str, Any] = QWEN3_06B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
MIXTURE: dict[str, Any] = QWEN3_06B | {
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
"""A mixture of experts of 1.16 billion parameters, its first layer dense."""
CHAT_TOKENS = 3
"""What the chat template puts around a prompt of one character a token."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes and counts. Defaults are those of a GPU."""

    model: str
    """The directory that the model is written into."""
    device: str = "cuda"
    shape: dict[str, Any] = field(default_factory=lambda: dict(QWEN3_06B))
    prompts: int = 32
    group: int = 8
    prompt_tokens: int = 64
    response_tokens: int = 512
    """Of every response: the model names no token as the end."""
    requests: tuple[int, ...] = (1, 64, 256)
    """Decoded together."""
    repeats: int = 3
    steps: int = 5
    """Whole steps of the session, after a first one."""
    trl_steps: int = 2
    """Iterations of TRL, after a first one."""
    micro_batches: tuple[int, ...] = (16384, 32768, 8192, 4096)
    """Tokens, in the order of their turns."""
    small_card_gib: float = 24.0
    small_card_response: int = 1024
    small_card_prompts: int = 32
    small_card_steps: int = 20
    learning_steps: int = 40
    too_long: int = 400_000
    """Tokens of a sample that no card holds: a micro-batch has at least one sample."""
    matrix: int = 8192
    """Rows and columns of the matrices that the matrix rate is taken from."""
    copied: int = 2 << 30
    """Bytes of the copies that the bandwidth is taken from."""

    @classmethod
    def of(cls, directory: str, device: str, *, small: bool, small_card_steps: int) -> Self:
        """The workload of a GPU, or with `small` one that a laptop runs in minutes."""
        if not small:
            return cls(directory, device, small_card_steps=small_card_steps)
        return cls(
            directory,
            device,
            shape=dict(TINY),
            prompts=4,
            group=4,
            prompt_tokens=16,
            response_tokens=24,
            requests=(1, 4, 16),
            repeats=2,
            steps=2,
            trl_steps=1,
            micro_batches=(256, 128),
            small_card_response=32,
            small_card_prompts=2,
            small_card_steps=min(small_card_steps, 3),
            learning_steps=3,
            too_long=400,
            matrix=256,
            copied=16 << 20,
        )

    @property
    def samples(self) -> int:
        """Of an iteration."""
        return self.prompts * self.group

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.prompt_tokens + self.response_tokens

    @property
    def width(self) -> int:
        """Bytes of a number in the computation."""
        return 2 if self.device == "cuda" else 4

    def rows(self) -> list[dict[str, Any]]:
        """Prompts that are `prompt_tokens` long, as rows of data: one character is one token."""
        draw = random.Random(0)
        letters = string.ascii_letters + string.digits
        count = self.prompt_tokens - CHAT_TOKENS
        return [
            {"prompt": "".join(draw.choices(letters, k=count)), "label": str(number)}
            for number in range(8 * self.prompts)
        ]

    def token_rows(self, count: int) -> list[list[int]]:
        """Prompts as token ids, for what is driven below the session."""
        draw = random.Random(1)
        size = self.shape["vocab_size"]
        return [[draw.randrange(3, size) for _ in range(self.prompt_tokens)] for _ in range(count)]

    def config(self, **changes: Any) -> SessionConfig:
        """The session's settings; `changes` replaces whole sections' keys, as `section={...}`."""
        sections: dict[str, dict[str, Any]] = {
            "model": {"name": self.model},
            "data": {"shuffle": False},
            "rollout": {"max_response_len": self.response_tokens},
            "training": {
                "rollout_batch_size": self.prompts,
                "n_samples_per_prompt": self.group,
                "learning_rate": 1e-6,
            },
        }
        for name, keys in changes.items():
            sections[name] = sections.get(name, {}) | keys
        return SessionConfig(name="gpu-benchmark", device=self.device, **sections)


def reward(sample: Any) -> float:
    """Cheap, and different within each group, so that every sample trains."""
    return float(sample.index % 3 == 0)
