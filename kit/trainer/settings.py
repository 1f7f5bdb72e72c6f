"""`TrainerSettings`: what a trainer is started with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kit.algo.own_loss import LossFunction
from kit.config import HeadKind, LoraConfig, QuantizationConfig, TrainingConfig
from kit.models.compile import Recompute
from kit.trainer.batch import MAX_TOKENS
from kit.weight_sync.transform import EXACT, Disturbance


@dataclass(frozen=True, slots=True)
class OwnSettings:
    """Settings in which sessions may differ that share a trainer."""

    name: str
    """Of the session among those, empty for the first."""
    training: TrainingConfig
    temperature: float
    seed: int
    max_response_len: int
    loss: LossFunction | None


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """Settings of one rank."""

    model_path: str
    training: TrainingConfig
    temperature: float
    device: str
    dtype: str
    seed: int
    rank: int
    rendezvous: str
    """Where the ranks meet: a file's path, or `tcp://HOST:PORT` where they are on several nodes."""
    max_response_len: int = 1
    """What a loss over a constant length divides by."""
    disturbance: Disturbance = EXACT
    """What is done to the weights on their way to the engine."""
    trust_remote_code: bool = False
    lora: LoraConfig | None = None
    """Adapters that are trained; None trains all weights."""
    draft_path: str | None = None
    """Directory of the draft that is trained along; None where none is."""
    draft_head: HeadKind | None = None
    """What kind of head on the policy's hidden states the draft is; None is a model of its own."""
    sends_adapters: bool = False
    """Whether engines have the adapters beside their weights; otherwise a sync merges them."""
    quantization: QuantizationConfig | None = None
    """How the engine's weights are quantised."""
    trains_quantized: bool = False
    """Whether the trainer computes with the same weights."""
    recompute: Recompute = "none"
    compile: bool = False
    offload: bool = False
    """Weights and optimizer stay in host memory."""
    max_tokens: int = MAX_TOKENS
    """Most tokens in a micro-batch."""
    bucket_bytes: int = 1 << 62
    """Most bytes in a bucket of a weight sync."""
    sleeps: bool = False
    """Whether it leaves the device while the engine generates."""
    cards: str = ""
    """The GPU that it may use, in the form of CUDA_VISIBLE_DEVICES; empty leaves it as it is."""
    feeds: bool = True
    """Whether it sends weights to an engine; all ranks help to gather them."""
    shares_memory: bool = True
    """Whether engines read weights from its memory; otherwise they are broadcast."""
    loss: LossFunction | None = None
    """A function of the user's own in place of the estimator's loss."""
    attention_backend: str = "auto"
    """The engine's, where both compute with the same operators on a GPU."""
    memory_limit: int | None = None
    """Bytes that the process may take of a GPU; None all there is."""

    def with_own(self, own: OwnSettings) -> TrainerSettings:
        """These with those of one session."""
        return replace(
            self,
            training=own.training,
            temperature=own.temperature,
            seed=own.seed,
            max_response_len=own.max_response_len,
            loss=own.loss,
        )

    @property
    def init_method(self) -> str:
        """`rendezvous` in torch's form."""
        local = not self.rendezvous.startswith("tcp://")
        return f"file://{self.rendezvous}" if local else self.rendezvous

    @property
    def max_tokens_forward(self) -> int:
        """Tokens of a micro-batch without gradients. On a GPU twice as many: they take less memory
        than the others with gradients, and it waits half as often for the host.
        """
        return self.max_tokens * (2 if self.device == "cuda" else 1)
