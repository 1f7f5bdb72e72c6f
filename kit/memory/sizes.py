"""`Sizes`: what a model takes of a device, part by part, in bytes; `kit.memory.plan` adds up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kit.config import SessionConfig
from kit.data.prompts import PromptSet
from kit.models.source import ModelShape, ModelSource
from kit.utils.hardware import GIB

CONTEXT = int(0.6 * GIB)
"""What the driver and the libraries of one process hold on a GPU."""


GRAPHS = int(1.8 * GIB)
"""SGLang's captured graphs, its workspaces and the logits of a decode step."""


ASLEEP = int(1.4 * GIB)
"""What is left of those while it sleeps."""


LOGITS_AT_ONCE = 1 << 28
"""Of a piece, and as many of their gradient: see `kit.model.log_probs`."""


Recompute = Literal["none", "selective", "alternating", "full"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of everything on one device, for one model and one configuration."""

    shape: ModelShape
    config: SessionConfig
    width: int
    """Bytes of a number in the computation."""
    gpu: bool
    compiled: bool

    @property
    def ranks(self) -> int:
        """Trainers that divide weights and optimizer. On a CPU all of them are in one memory."""
        return self.config.training.num_trainers if self.gpu else 1

    @property
    def apart(self) -> bool:
        """Have engine and trainer a device each?"""
        return self.gpu and not self.config.cluster.colocate

    @property
    def engines(self) -> int:
        """Engines that share a rollout."""
        engine = self.config.engine
        if not self.gpu:
            return 1
        return engine.replicas or (
            1 if self.apart else max(self.ranks // engine.tensor_parallel, 1)
        )

    @property
    def side_by_side(self) -> int:
        """Engines that share one GPU."""
        engine = self.config.engine
        if not self.gpu or self.apart:
            return 1
        return max(self.engines * engine.tensor_parallel // self.ranks, 1)

    @property
    def engine_weights(self) -> int:
        """What one device has of them, for all its engines."""
        return self.side_by_side * self.one_engines_weights

    @property
    def one_engines_weights(self) -> int:
        """One device's part of them."""
        return self.shape.parameters * self.width // self.config.engine.tensor_parallel

    @property
    def engine_context(self) -> int:
        """Of all engines on one device."""
        return self.side_by_side * CONTEXT if self.gpu else 0

    @property
    def engine_graphs(self) -> int:
        """Of all engines on one device, with their workspaces."""
        return self.side_by_side * GRAPHS if self.gpu else 0

    @property
    def engine_asleep(self) -> int:
        """What is left of those while they sleep."""
        return self.side_by_side * ASLEEP if self.gpu else 0

    @property
    def engine_awake(self) -> int:
        """Engines of one device without their KV caches."""
        return self.engine_weights + self.engine_context + self.engine_graphs

    @property
    def sleeps(self) -> bool:
        """May the engine let go of memory while the trainer works?"""
        return self.gpu and not self.apart and self.config.memory.sleep != "never"

    @property
    def token(self) -> int:
        """Of the KV caches on one device, which take the same number of tokens each. Devices of an
        engine divide its heads, as far as there are as many.
        """
        engine = self.config.engine
        parts = min(engine.tensor_parallel // engine.data_parallel, self.shape.key_value_heads)
        return self.side_by_side * self.shape.key_value_bytes(self.width) // parts

    def rollout_tokens(self, longest: int) -> int:
        """Of one engine's share of a rollout whose samples are all as long as they may be."""
        return -(-self.config.samples_at_once // self.engines) * longest

    def wanted_tokens(self, longest: int) -> int:
        """Of the KV cache, so that no sample of a rollout has to wait."""
        return self.config.engine.max_total_tokens or self.rollout_tokens(longest)

    def least_tokens(self, longest: int) -> int:
        """Of the KV cache, without which nothing can be generated, or which are asked for."""
        return self.config.engine.max_total_tokens or longest

    def resident(self, offload: bool) -> int:
        """Trainer between updates: float32 weights, two moments, further models; a share each."""
        if offload:
            return 0
        training, p = self.config.training, 4 * self.shape.parameters
        critic = training.advantage_estimator == "ppo"
        own = 3 * p + int(training.has_reference) * p + int(critic) * 3 * p
        return own // self.ranks

    def working(self) -> int:
        """Trainer in an update, beside activations: gradients, and weights in their width.

        FSDP gathers weights in memory of its own, from which they are copied: three times theirs.
        """
        return self.gradients + (3 if self.gpu else 1) * self.width * self.gathered

    @property
    def gradients(self) -> int:
        """A rank's share of them, float32. With offload too: they are handed in on the device."""
        return 4 * self.shape.parameters // self.ranks

    def not_given_back(self, offload: bool) -> int:
        """What the trainer holds of an update's memory even where it gives back all it can.

        FSDP hands gradients in on a stream of its own. With offload about as much as they take
        stays with the process: 2 to 3 GiB of 0.6 G parameters on an H100, in every phase.
        """
        return self.gradients if offload and self.gpu else 0

    @property
    def gathered(self) -> int:
        """Parameters that a rank has whole at a time: all of them, or, with several ranks, the
        embeddings and two layers, of which one is on its way.
        """
        s = self.shape
        if self.ranks == 1:
            return s.parameters
        embeddings = min(s.vocabulary * s.hidden * (1 if s.tied else 2), s.parameters)
        return embeddings + min(2, s.layers) * (s.parameters - embeddings) // s.layers

    def gradients_handed_in(self, offload: bool) -> int:
        """At the end of a backward pass: gradients as computed, and in float32, twice; with offload
        one of these is what is never given back.
        """
        return (self.width + 4 + (0 if offload else 4)) * self.gathered

    def activations(self, tokens: int, level: Recompute) -> int:
        """Kept for the backward pass, and what one layer needs on top."""
        s, width = self.shape, self.width
        queries, keys = s.heads * s.head_size, s.key_value_heads * s.head_size
        # Compiled code keeps queries and keys before and after their norm and rotation, and the
        # product in the feed-forward part beside its two factors.
        attention = 2 * s.hidden + 3 * queries + 3 * keys
        kept = {
            "none": attention + 3 * s.intermediate,
            "selective": attention,
            "alternating": (attention + s.hidden) / 2,
            "full": s.hidden,
        }
        layer = attention + 5 * s.intermediate
        eager = 1.0 if self.compiled else 2.3
        return int(eager * tokens * width * (s.layers * kept[level] + layer))

    def logits(self, tokens: int) -> int:
        """Pieces of logits and the output embedding's gradient; all logits of a small model."""
        s = self.shape
        in_pieces = 2 * LOGITS_AT_ONCE * self.width + 4 * s.vocabulary * s.hidden
        return min(in_pieces, 5 * 4 * tokens * s.vocabulary)

    def update_peak(self, tokens: int, level: Recompute, offload: bool) -> tuple[int, int]:
        """(working memory, activations or what takes their place at the end)."""
        forward = self.activations(tokens, level) + self.logits(tokens)
        # One layer after the other turns from activations into gradients.
        return self.working(), max(forward, self.gradients_handed_in(offload))

    def buckets(self) -> int:
        """Two buffers that weights travel in."""
        return min(2 * self.config.engine.update_weight_buffer_size, self.one_engines_weights)


DEFAULT_RESPONSE_LENGTH = 1024


def response_limit(config: SessionConfig, train: PromptSet, model: ModelSource) -> int:
    """Tokens that a response may have: as configured, or as the task needs."""
    default = min(DEFAULT_RESPONSE_LENGTH, model.context_length // 2)
    return config.rollout.max_response_len or train.max_response_len or default
