"""`Sizes`: device memory of each part of a session, in bytes; `kit.memory.plan` adds them up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kit.config import MOMENTS_BYTES, SessionConfig
from kit.data.prompts import PromptSet
from kit.models.adapters import AdapterShape
from kit.models.source import ModelShape, ModelSource
from kit.utils.hardware import GIB

CONTEXT = int(0.6 * GIB)
"""GPU memory of the driver and the libraries of one process."""
GRAPHS = int(1.8 * GIB)
"""SGLang's captured graphs, its workspaces and the logits of a decode step."""
ASLEEP = int(0.6 * GIB)
"""GPU memory that an engine still holds while it sleeps."""
MOST_GRAPHS = 256
"""Largest batch whose decoding is captured as a graph; beyond it launching costs little."""
LOGITS_AT_ONCE = 1 << 28
"""Logits in one piece, and as many in its gradient: see `kit.models.log_probs`."""

WEIGHTS, FROZEN = "trainer: weights, optimizer", "trainer: frozen weights"
FOUR_BIT, ADAPTERS = "trainer: frozen weights in 4 bits", "trainer: adapters, optimizer"
DRAFT = "trainer: draft, optimizer"
KEPT = (WEIGHTS, FROZEN, FOUR_BIT, ADAPTERS, DRAFT)
"""Parts of a plan that a trainer keeps between updates, on the device or in host memory."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a parameter in 4 bits, with its share of scales; see `kit.operators.nf4`."""
FP8_BLOCK = 128
"""Rows and columns that share a scale in FP8; see `kit.operators.low_precision`."""
MERGED = 6
"""Bytes a parameter of the one weight that a sync adds its adapter to: the weight and the sum."""
SUMMED = 20 << 22
"""Bytes that `kit.models.lora.merged` takes beside; the product is in float64."""

Recompute = Literal["none", "selective", "alternating", "full"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of everything on one device, for one model and one configuration."""

    shape: ModelShape
    config: SessionConfig
    width: int
    """Bytes of a number in the computation."""
    gpu: bool
    compiled: bool
    adapters: AdapterShape | None = None
    """Adapters, beside which all weights are frozen; None where all are trained."""
    draft: ModelShape | None = None
    """The model that drafts for the engine; None where none does."""
    context_length: int = 0
    """Tokens of the longest sample that the engine takes; only drafts ask for it."""

    @property
    def drafts_trained(self) -> int:
        """Parameters of a draft that learns along."""
        return self.draft.parameters if self.draft and self.config.training.draft else 0

    @property
    def engine_draft(self) -> int:
        """Weights of the draft in the engines of one device."""
        return self.side_by_side * self.width * self.draft.parameters if self.draft else 0

    @property
    def trained(self) -> int:
        """Parameters that have a gradient and an optimizer's moments."""
        return self.adapters.parameters if self.adapters else self.shape.parameters

    @property
    def four_bit(self) -> int:
        """Parameters that the trainer keeps in 4 bits."""
        lora = self.config.model.lora
        return self.adapters.linear if self.adapters and lora and lora.load_in_4bit else 0

    @property
    def what_is_kept(self) -> str:
        """What the trainer holds besides activations, in words that a size follows."""
        weights = f"{self.shape.parameters / 1e6:,.0f} M parameters"
        if self.adapters:
            adapters = f"{self.trained / 1e6:,.1f} M parameters of adapters"
            if self.four_bit:
                weights += f", {self.four_bit / 1e6:,.0f} M of them in 4 bits"
            return f"Weights of {weights}, with gradients and optimizer of {adapters}"
        return f"Weights, gradients and optimizer of {weights}"

    @property
    def ranks(self) -> int:
        """Trainer ranks that shard weights and optimizer; 1 on a CPU, where they share memory."""
        return self.config.training.num_trainers if self.gpu else 1

    @property
    def apart(self) -> bool:
        """Whether engine and trainer have a device each."""
        return self.gpu and not self.config.cluster.colocate

    @property
    def engines(self) -> int:
        """Number of engines that share a rollout."""
        engine = self.config.engine
        if not self.gpu:
            return 1
        return engine.replicas or (
            1 if self.apart else max(self.ranks // engine.tensor_parallel, 1)
        )

    @property
    def side_by_side(self) -> int:
        """Number of engines that share one GPU."""
        engine = self.config.engine
        if not self.gpu or self.apart:
            return 1
        return max(self.engines * engine.tensor_parallel // self.ranks, 1)

    @property
    def engine_weights(self) -> int:
        """Engine weights on one device, of all its engines."""
        return self.side_by_side * self.one_engines_weights

    @property
    def one_engines_weights(self) -> int:
        """Weights of one engine on one of its devices."""
        plain = self.shape.parameters - self.quantized
        codes = int(self.quantized * self.quantized_bytes)
        return (plain * self.width + codes) // self.config.engine.tensor_parallel

    @property
    def quantized(self) -> int:
        """Parameters of which the engine has codes and scales: its decoder's linear layers."""
        if self.config.quantization is None:
            return 0
        s = self.shape
        attention = 2 * s.hidden * (s.heads + s.key_value_heads) * s.head_size
        return s.layers * (attention + 3 * s.hidden * s.intermediate)

    @property
    def quantized_bytes(self) -> float:
        """Bytes of such a parameter with its share of scales; a CPU's engine packs no codes."""
        how = self.config.quantization
        if how is None or how.method == "fp8":
            return 1 + 4 / FP8_BLOCK**2
        return 1 + 2 / how.numbers_a_scale

    @property
    def engine_context(self) -> int:
        """Driver and library memory of all engines on one device."""
        return self.side_by_side * CONTEXT if self.gpu else 0

    @property
    def engine_graphs(self) -> int:
        """CUDA graphs and workspaces of all engines on one device."""
        return self.side_by_side * (GRAPHS + self.drafting) if self.gpu else 0

    @property
    def drafting(self) -> int:
        """What an engine's graphs take more where it verifies drafts, and drafts itself.

        For each token that a pass verifies: logits in float32, as probabilities and with the
        numbers they are drawn by; for each such token and place before it the number of the place,
        and whether it is seen; and what its heads sum up in 8 parts. The draft has places of its
        own for each step, and for reading what was accepted.
        """
        drafts = self.config.engine.speculative
        if drafts is None:
            return 0
        requests = self.config.engine.max_running_requests or MOST_GRAPHS
        batch = min(-(-requests // self.engines), MOST_GRAPHS)
        verified, places = batch * drafts.draft_tokens, 8 * self.context_length
        each = 4 * 4 * self.shape.vocabulary + places + self.context_length
        total = verified * (each + self._partial_sums(self.shape))
        if self.draft:
            passes = verified + batch * drafts.topk * (drafts.steps + 1)
            total += passes * (places + self._partial_sums(self.draft))
        return total

    @staticmethod
    def _partial_sums(shape: ModelShape) -> int:
        return 8 * 4 * shape.heads * shape.head_size

    @property
    def engine_asleep(self) -> int:
        """Memory that the engines of one device still hold while they sleep."""
        return self.side_by_side * ASLEEP if self.gpu else 0

    @property
    def sends_adapters(self) -> bool:
        """Whether the engine has adapters beside its weights, not merged into them."""
        return self.adapters is not None and self.config.engine.lora == "adapter"

    @property
    def engine_adapters(self) -> int:
        """Room for adapters beside the weights of all engines on one device.

        Each is there twice: as it came, and in its slot.
        """
        slots = 2 * self.config.engine.max_loras_per_batch
        return self.side_by_side * slots * self.width * self.trained if self.sends_adapters else 0

    @property
    def engine_stays(self) -> int:
        """What the engines of one device never let go."""
        return self.engine_context + self.engine_adapters

    @property
    def engine_awake(self) -> int:
        """Memory of the engines of one device, without their KV caches."""
        return self.engine_weights + self.engine_draft + self.engine_stays + self.engine_graphs

    @property
    def sleeps(self) -> bool:
        """Whether the engine may release memory while the trainer works."""
        return self.gpu and not self.apart and self.config.memory.sleep != "never"

    @property
    def token(self) -> int:
        """Bytes of one token in the KV caches of one device; each cache holds the same tokens.

        A draft has a cache of its own for them.
        The devices of a tensor-parallel engine share its key-value heads, as far as there are
        enough of them.
        """
        engine = self.config.engine
        width = self.width if engine.kv_cache_dtype == "auto" else 1
        parts = min(engine.tensor_parallel // engine.data_parallel, self.shape.key_value_heads)
        of_draft = self.draft.key_value_bytes(width) if self.draft else 0
        return self.side_by_side * (self.shape.key_value_bytes(width) // parts + of_draft)

    def rollout_tokens(self, longest: int) -> int:
        """Tokens of one engine's share of a rollout, if all its samples have full length."""
        return -(-self.config.samples_at_once // self.engines) * longest

    def wanted_tokens(self, longest: int) -> int:
        """KV cache tokens with which no sample of a rollout has to wait."""
        return self.config.engine.max_total_tokens or self.rollout_tokens(longest)

    def least_tokens(self, longest: int) -> int:
        """KV cache tokens that generating needs at least, or those that the settings ask for."""
        return self.config.engine.max_total_tokens or longest

    def resident(self, offload: bool) -> int:
        """A rank's memory between updates: all of `kept`."""
        return sum(size for _, size in self.kept(offload))

    def kept(self, offload: bool) -> tuple[tuple[str, int], ...]:
        """A rank's memory between updates, part by part: weights, two moments, further models.

        All in float32, but the weights beside adapters in the dtype of the computation; and with
        adapters the reference is the same weights.
        """
        training, p = self.config.training, self.shape.parameters
        networks = 1 + int(training.advantage_estimator == "ppo")
        if self.adapters:
            parts = [
                (FROZEN, networks * self.width * (p - self.four_bit)),
                (ADAPTERS, networks * 12 * self.trained),
            ]
        else:
            trained = networks * (4 + MOMENTS_BYTES[training.optimizer])
            parts = [(WEIGHTS, int(p * (trained + 4 * int(training.has_reference))))]
        if self.drafts_trained:
            parts.append((DRAFT, 12 * self.drafts_trained))
        shared = tuple((name, 0 if offload else size // self.ranks) for name, size in parts)
        if not self.four_bit:
            return shared
        # Each rank has all of these.
        return (shared[0], (FOUR_BIT, int(networks * NF4_BYTES * self.four_bit)), *shared[1:])

    def working(self, offload: bool = False) -> int:
        """Trainer memory in an update, without activations: gradients and gathered weights.

        FSDP gathers weights into buffers of its own and copies out of them, so they count three
        times on a GPU.
        """
        computed = self.gathered(offload) + self.drafts_trained
        gathered = (3 if self.gpu else 1) * self.width * computed
        return self.gradients + gathered + self.read_again

    @property
    def read_again(self) -> int:
        """Weights in the dtype of the computation that are made of others to compute with.

        Of weights in 4 bits that is one at a time. Where trainer and engine compute with the same
        bits, it is the sum of each weight and its adapter, until its backward pass; and where
        weights are quantised what each one's codes stand for. Of FP8 on a GPU it is the codes, of
        policy and critic, and what those of gate and up stand for, in their backward pass.
        """
        how = self.config.model.quantization
        if how and how.method == "fp8" and self.gpu:
            networks = 1 + int(self.config.training.advantage_estimator == "ppo")
            codes = int(networks * self.quantized_bytes * self.quantized)
            return codes + 2 * self.width * self.shape.hidden * self.shape.intermediate
        if how:
            return self.width * self.quantized
        if self.adapters is None:
            return 0
        if self.config.training.true_on_policy:
            return self.width * self.adapters.beside
        return self.width * self.adapters.largest if self.four_bit else 0

    @property
    def gradients(self) -> int:
        """A rank's share of the float32 gradients; on the device also with offload."""
        return 4 * (self.trained + self.drafts_trained) // self.ranks

    def not_given_back(self, offload: bool) -> int:
        """Memory of an update that the trainer keeps even after it has released its cache.

        FSDP reduces gradients on a stream of its own. With offload, about as much memory as they
        take stays with the process in every phase: 2 to 3 GiB for 0.6 G parameters on an H100.
        """
        return self.gradients if offload and self.gpu else 0

    def gathered(self, offload: bool) -> int:
        """Unsharded parameters that a rank holds at a time, as copies.

        With one rank these are all that are trained, with offload all; with several ranks, the
        embeddings and two layers, the second of which is being gathered.
        """
        s = self.shape
        parameters = s.parameters - self.four_bit
        if self.ranks == 1:
            return parameters if offload else self.trained
        embeddings = min(s.vocabulary * s.hidden * (1 if s.tied else 2), parameters)
        return embeddings + min(2, s.layers) * (parameters - embeddings) // s.layers

    def gradients_handed_in(self, offload: bool) -> int:
        """Gradients at the end of a backward pass: as computed, and twice in float32.

        With offload one of the float32 copies is already counted by `not_given_back`.
        """
        share = min(self.gathered(offload), self.trained)
        return (self.width + 4 + (0 if offload else 4)) * share

    def activations(self, tokens: int, level: Recompute) -> int:
        """Activations kept for the backward pass, and those that one layer needs on top."""
        s, width = self.shape, self.width
        queries, keys = s.heads * s.head_size, s.key_value_heads * s.head_size
        # Compiled code keeps queries and keys before and after their norm and rotation, and the
        # product in the feed-forward part beside its two factors; adapters keep what they read,
        # which weights make again of what was normalised.
        inputs = 4 if self.adapters else 2
        attention = inputs * s.hidden + 3 * queries + 3 * keys
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
        """Logits in pieces and the output embedding's gradient, or all logits of a small model."""
        s = self.shape
        in_pieces = 2 * LOGITS_AT_ONCE * self.width
        if self.adapters is None or self.adapters.trains_head:
            in_pieces += 4 * s.vocabulary * s.hidden
        copies = 6 if s.caps_logits else 5
        return min(in_pieces, copies * 4 * tokens * s.vocabulary)

    def update_peak(self, tokens: int, level: Recompute, offload: bool) -> tuple[int, int]:
        """Peak of an update: (working memory, activations or the gradients that replace them)."""
        forward = self.activations(tokens, level) + self.logits(tokens)
        taught = 0
        training = self.config.training.draft
        drafts = self.config.engine.speculative
        is_head = drafts is not None and drafts.head is not None
        if self.draft and training and (is_head or training.loss == "forward_kl"):
            # The policy's output in each place waits for the draft's pass, which takes the
            # policy's output embedding, too. Logits of both are made in pieces half as large. A
            # head also reads the embeddings, and has both by its entries, and side by side.
            rows = self.width * tokens * self.shape.hidden
            of_layers = 1 if drafts and drafts.algorithm == "eagle3" else 0
            kept, read = (2 * rows, 4 * rows) if is_head else (rows, 0)
            kept, read = kept + 3 * of_layers * rows, read + 4 * of_layers * rows
            own = replace(self, shape=self.draft, draft=None)
            head = self.width * self.shape.vocabulary * self.shape.hidden
            passes = 2 if is_head else 1
            of_pass = own.activations(tokens, level) + own.logits(tokens)
            taught = kept + read + head + passes * of_pass
            forward += kept
        # One layer after the other turns from activations into gradients.
        return self.working(offload), max(forward, taught, self.gradients_handed_in(offload))

    def buckets(self) -> int:
        """The two buffers of a weight sync; the embeddings, if larger, have one to themselves."""
        usual = self.config.engine.update_weight_buffer_size
        embeddings = self.width * self.shape.vocabulary * self.shape.hidden
        return min(usual + max(usual, embeddings), self.one_engines_weights)

    def sync(self, offload: bool, cache: int | None) -> int:
        """A weight sync on one device; on the trainer's where they are apart.

        Args:
            offload: the trainer's weights are in host memory.
            cache: bytes of the KV cache; None while the engine sleeps, but for its weights.
        """
        trainer = CONTEXT + self.resident(offload) + self.buckets() + self.merging
        if self.apart:
            return trainer
        rest = self.engine_asleep if cache is None else self.engine_graphs + cache
        return trainer + self.engine_stays + self.engine_weights + self.engine_draft + rest

    @property
    def merging(self) -> int:
        """Memory of a weight sync in which one weight after the other gets its adapter added."""
        if self.adapters is None or self.sends_adapters:
            return 0
        return MERGED * self.adapters.largest + min(20 * self.adapters.largest, SUMMED)


DEFAULT_RESPONSE_LENGTH = 1024


def response_limit(config: SessionConfig, train: PromptSet, model: ModelSource) -> int:
    """Longest response in tokens: as configured, or as the task needs."""
    default = min(DEFAULT_RESPONSE_LENGTH, model.context_length // 2)
    return config.rollout.max_response_len or train.max_response_len or default
