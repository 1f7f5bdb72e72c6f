"""A trainer in the tests' own process, and something to train it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kit.config import HeadKind, LoraConfig, QuantizationConfig, TrainingConfig
from kit.messages import TrainBatch
from kit.models.compile import Recompute
from kit.tiny import MODEL_DIR
from kit.trainer.actor import Trainer
from kit.trainer.batch import MAX_TOKENS
from kit.trainer.fsdp import FsdpBackend
from kit.trainer.settings import TrainerSettings
from kit.weight_sync.transport import ReceiveBuffer

# AdamW with a large eps is nearly plain gradient descent: small differences stay small.
PLAIN = {"learning_rate": 0.1, "adam_eps": 1.0, "clip_grad": 0.0}
Make = Callable[..., Trainer]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Starts trainers of a model with these settings, one at a time."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    threads = torch.get_num_threads()
    count = 0

    def make(
        model: Path = MODEL_DIR,
        max_tokens: int = MAX_TOKENS,
        lora: LoraConfig | None = None,
        dtype: str = "float32",
        quantization: QuantizationConfig | None = None,
        recompute: Recompute = "none",
        compiles: bool = False,
        draft_path: Path | None = None,
        draft_head: HeadKind | None = None,
        device: str = "cpu",
        **training: Any,
    ) -> Trainer:
        nonlocal count
        if dist.is_initialized():
            dist.destroy_process_group()
        count += 1
        trainer = Trainer(
            TrainerSettings(
                model_path=str(model),
                training=TrainingConfig(**training),
                temperature=0.8,
                device=device,
                dtype=dtype,
                seed=0,
                rank=0,
                rendezvous=str(tmp_path / f"rendezvous-{count}"),
                max_tokens=max_tokens,
                lora=lora,
                quantization=quantization,
                trains_quantized=quantization is not None,
                recompute=recompute,
                compile=compiles,
                draft_path=draft_path and str(draft_path),
                draft_head=draft_head,
            )
        )
        trainer.start()
        trainer.place()
        return trainer

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)


def batch(seed: int = 0) -> TrainBatch:
    """Eight samples of different lengths, some of their tokens masked."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(5, 4), (9, 1), (3, 7), (12, 3), (4, 4), (6, 2), (8, 5), (2, 6)]
    return TrainBatch(
        tokens=[torch.randint(3, 104, (p + r,), generator=random).tolist() for p, r in shapes],
        response_lengths=[r for _, r in shapes],
        loss_masks=[[int(i != 1) for i in range(r)] for _, r in shapes],
        advantages=[1.0, -1.0, 0.5, 0.0, -0.5, 2.0, -2.0, 1.0],
        rollout_log_probs=None,
    )


def weights(trainer: Trainer) -> torch.Tensor:
    """Every weight, as the engine would get it."""
    handle = trainer.export_weights()
    assert handle is not None
    return ReceiveBuffer().receive(handle).view(torch.float32)


def backend(trainer: Trainer) -> FsdpBackend:
    """Its networks, in the form of the backend that there is."""
    assert isinstance(trainer.backend, FsdpBackend)
    return trainer.backend
