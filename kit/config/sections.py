"""The sections of the settings, all but `training`: model, data, reward, rollout, engine, ...

The docstring under a field is its description: what it does, its unit, and what None means.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from kit.config.section import Above0, Fraction, NonNegative, Positive, Section
from kit.config.speculative import SpeculativeConfig


class ClusterConfig(Section):
    """Which Ray cluster to use, and how devices are shared; see docs/devices.md."""

    address: str | None = None
    """None starts a Ray head of the session's own on this machine. `auto` joins the Ray cluster
    that runs here already, `HOST:PORT` the one whose head listens there; this machine has to be one
    of its nodes. The cluster's token is taken from where Ray itself looks for it."""
    colocate: bool = True
    """True: trainers and engines share the devices, each engine fed through memory by the trainers
    on its own. False: every trainer and every engine has devices to itself, and weights are
    broadcast (NCCL between GPUs, gloo between CPUs)."""


class LoggingConfig(Section):
    """Copies of the metrics for TensorBoard, Weights & Biases and trackio, under Miles' names.

    The run's own files are the truth. A logger that fails is told once and stops nothing.
    """

    dir: str = ""
    """Folder of what they write: `tensorboard/`, `wandb/` and `trackio/` in it. Empty: the run's
    folder in a batch run, otherwise one of its own in `logs/`."""
    use_tensorboard: bool = False
    """Write event files; look at them with `tensorboard --logdir`."""
    tb_project_name: str = ""
    """A folder in `tensorboard/`; empty takes none."""
    tb_experiment_name: str = ""
    """A folder in that one; empty takes none."""
    use_wandb: bool = False
    """Log to Weights & Biases. The key is never a setting: `wandb login`, or WANDB_API_KEY."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """offline only writes files, which `wandb sync` sends later. None: as WANDB_MODE says, else
    online."""
    wandb_project: str = "kit"
    """The project that the run belongs to."""
    wandb_team: str = ""
    """The entity that the project belongs to; empty takes your own."""
    wandb_group: str = ""
    """The group of runs that it belongs to; empty takes the session's name."""
    wandb_run_id: str = ""
    """Go on with this run, such as one that a killed kernel had begun; empty begins one."""
    wandb_host: str = ""
    """Address of a server of your own; empty takes wandb's."""
    wandb_always_use_train_step: bool = False
    """Count `rollout/step` and `eval/step` in optimizer steps, not in rollouts."""
    use_trackio: bool = False
    """Log to trackio, which keeps runs on this machine; `trackio show` serves them."""
    trackio_project: str = ""
    """Empty takes `wandb_project`."""
    trackio_run_name: str = ""
    """Empty takes the run folder's name, or the session's."""
    trackio_group: str = ""
    """Empty takes `wandb_group`, or the session's name."""
    trackio_space_id: str = ""
    """Log to this Space of the Hugging Face hub, not to files."""
    trackio_server_url: str = ""
    """Log to a trackio server of your own, not to files."""

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the loggers that are switched on."""
        switches = {
            "tensorboard": self.use_tensorboard,
            "wandb": self.use_wandb and self.wandb_mode != "disabled",
            "trackio": self.use_trackio,
        }
        return tuple(name for name, wanted in switches.items() if wanted)


UNNAMED = "session"
TINY = "tiny"
"""The model that ships with the kit; see `kit/tiny/`."""
TINY_MOE = "tiny-moe"
"""The mixture of experts that ships with it, for the same tasks."""
SHIPPED = (TINY, TINY_MOE)


class LoraConfig(Section):
    """Adapters that are trained beside frozen weights, by PEFT's names; see docs/lora.md.

    What PEFT can do beyond these settings, and what is refused here, stands on that page.
    """

    r: Positive = 8
    """Rank of each adapter: width of its two matrices A and B."""
    lora_alpha: Positive = 16
    """What B A is multiplied by, times `r`: the adapter adds lora_alpha / r times B A."""
    lora_dropout: NonNegative = 0.0
    """Only 0: a policy that drops something is another one at each pass, and not the engine's."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter: `all-linear` in every layer of the model, or their names,
    [q_proj, v_proj]. The output layer and embeddings get none."""
    use_rslora: bool = False
    """Add lora_alpha / sqrt(r) times B A instead, so that a larger rank needs no other rate."""
    init_lora_weights: Literal[True, "gaussian"] = True
    """How A begins: true as PEFT does (Kaiming), gaussian with standard deviation 1 / r. B begins
    at zero, so that training begins with the model as it is."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the adapters, by their last names, such as lm_head.
    Embeddings that are tied to the output layer cannot be among them."""
    load_in_4bit: bool = False
    """Keep the frozen weights of linear layers in 4 bits (NF4 with double quantisation, as QLoRA).
    The model is then the one that 4 bits can say: the reference, the engine and exports have its
    weights too."""
    adapter_path: str | None = None
    """Go on with the adapter in this directory, which PEFT or `session.export_hf(adapter=True)`
    wrote; it has to be of this model and of these settings. The reference is the model without it.
    None begins with adapters that add nothing."""

    @property
    def factor(self) -> float:
        """What B A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @field_validator("target_modules", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        """Refuse one name, which PEFT would take for a regular expression."""
        if isinstance(value, str) and value != "all-linear":
            raise ValueError(
                f"model.lora.target_modules is {value!r}. What to do: give a list of names, "
                f"[{value}], or all-linear."
            )
        if isinstance(value, (list, tuple)) and not value:
            raise ValueError(
                "model.lora.target_modules is empty, so nothing would be trained. What to do: name "
                "layers, [q_proj, v_proj], or leave it out."
            )
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _begins_at_zero(cls, value: Any) -> Any:
        """Refuse ways to begin in which the model would not be its files'."""
        if value is not True and value != "gaussian":
            raise ValueError(
                f"model.lora.init_lora_weights is {value!r}; true and gaussian are known here: "
                "with others of PEFT's training does not begin with the model of its files, which "
                "the reference is. What to do: leave it out."
            )
        return value

    @field_validator("lora_dropout")
    @classmethod
    def _drops_nothing(cls, value: float) -> float:
        """Refuse dropout, which is switched off in whole models too."""
        if value:
            raise ValueError(
                f"model.lora.lora_dropout is {value:g}: a policy that drops something at random is "
                "another one at each pass, and the engine, which drops nothing, writes the samples "
                "of a third. What to do: leave it out."
            )
        return value

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    @property
    def changes_model(self) -> bool:
        """Whether training begins with another policy than the model of its files."""
        return self.adapter_path is not None or self.load_in_4bit


class QuantizationConfig(Section):
    """Linear layers in FP8 or INT4; see docs/low_precision.md. `fp8` alone is `{method: fp8}`."""

    method: Literal["fp8", "int4"]
    """fp8: weights in blocks of 128 x 128 and activations in blocks of 1 x 128, e4m3. int4: weights
    in groups along each row, symmetric, activations as they are."""
    group_size: Positive | None = None
    """Numbers of a row that share a scale (int4 only); None takes 128. It has to divide the inputs
    of every linear layer."""

    @property
    def numbers_a_scale(self) -> int:
        """The group size of int4."""
        return self.group_size or 128

    def __str__(self) -> str:
        return "FP8" if self.method == "fp8" else f"INT4 in groups of {self.numbers_a_scale}"

    @model_validator(mode="after")
    def _of_int4(self) -> Self:
        """Refuse a group size that nothing would read."""
        if self.group_size is not None and self.method != "int4":
            raise ValueError(
                f"quantization.group_size is {self.group_size}, and {self.method} has blocks of "
                "128 x 128. What to do: leave it out, or take int4."
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        """Take a method's name alone for the section."""
        return {"method": value} if isinstance(value, str) else value


class ModelConfig(Section):
    """The model and its precision, context, attention and recomputation."""

    name: str = TINY
    """A directory, a Hugging Face name such as Qwen/Qwen3-0.6B, or one that ships with the kit:
    `tiny`, or the mixture of experts `tiny-moe`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto: float32 on a CPU, bfloat16 on a GPU. Weights and optimizer
    are kept in float32 by the trainer in any case."""
    context_length: Positive | None = None
    """Longest prompt plus response, in tokens; None takes the model's own limit."""
    gradient_checkpointing: bool | Literal["selective", "alternating"] | None = None
    """Recompute in the backward pass instead of keeping: true all of each layer (least memory, a
    third more time), `selective` its feed-forward part, `alternating` the one in every other layer
    and the other in those between, false nothing; None lets the memory plan choose."""
    compile: bool | None = None
    """Compile the trainer's layers with torch.compile; None does so on a GPU for models of 100 M
    parameters and more. The first start takes half a minute longer; later ones find it on disk."""
    trust_remote_code: bool = False
    """Run Python code that a model directory brings along."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights; null trains all. The engine gets base and adapter as
    one weight, rounded once."""
    quantization: QuantizationConfig | None = None
    """Train through quantised weights and have the engine compute with the same: fp8, or int4
    (quantisation-aware training); null for neither. The trainer keeps float32 weights."""


class DataConfig(Section):
    """Sources of prompts, and how rows become tokens."""

    source: str = ""
    """Where training prompts come from: a JSONL, JSON, CSV, TSV or Parquet file (`.jsonl.gz`, too),
    a directory saved by `datasets`, `tiny:TASK`, or `reasoning_gym:TASK`. A slice may follow:
    `train.jsonl@[0:1000]`.
    Empty takes the model's first task: tiny:addition, otherwise reasoning_gym:gsm_symbolic."""
    eval_source: str | dict[str, str] = ""
    """Held-out prompts in the same notation; several sets by name, `{gsm: FILE, math: FILE}`, are
    evaluated one after the other, and the first one counts as the run's. Empty: the task's own
    held-out split where the source is a task, and no evaluation otherwise."""
    input_key: str = "prompt"
    """The field that holds the prompt: a string, or a list of chat messages. A field inside another
    is named with a dot, here and below: `reward_model.ground_truth`."""
    label_key: str = "label"
    """The field that holds the right answer; rows may lack it. Text or a number for built-in
    rewards; a list or a mapping is kept for a reward function of your own."""
    metadata_key: str = "metadata"
    """The field that holds a mapping which reward functions can read; rows may lack it."""
    apply_chat_template: bool = True
    """Render prompts through the model's chat template; a plain string counts as one user
    message."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false} for Qwen3."""
    add_bos_token: bool | None = None
    """Whether a plain prompt (`apply_chat_template: false`) begins with the BOS token of the model;
    None does as the tokenizer does. A text that begins with it already never gets a second."""
    system_prompt: str = ""
    """Put in front of plain string prompts as a system message, where not empty."""
    filter_overlong_prompts: bool = False
    """Leave out rows whose prompt and longest response do not fit into the context, and say how
    many they are. False refuses such data at the start."""
    shuffle: bool = True
    """A new order each epoch, from the seed."""
    size: Positive = 10_000
    """How many training rows a generated task (reasoning_gym) makes."""
    eval_size: Positive = 256
    """How many held-out rows a generated task (reasoning_gym) makes."""


class RewardConfig(Section):
    """The reward of a response, and its time limit."""

    name: str = ""
    """A built-in reward: exact, number, math, gsm8k, format, reasoning_gym. Empty takes the one
    that fits the data source, else `exact`."""
    weights: dict[str, float] = Field(default_factory=dict)
    """A weighted sum of built-in rewards instead of one, by name: {math: 0.9, format: 0.1}."""
    format_pattern: str = ""
    """The regular expression that `format` looks for in a response."""
    timeout: Above0 | None = 60.0
    """Seconds that a reward may take of one sample, which is then marked as failed; a function of
    all samples has so many for each. What does not end in place runs in a process of its own from
    then on, with a warning. None waits for ever. Nothing is ended under a debugger."""


class RolloutConfig(Section):
    """Sampling of responses, and which groups a step trains on."""

    temperature: float = Field(default=1.0, ge=1e-5)
    """Divides the logits, in the engine and in the trainer: below 1 surer, above 1 bolder. At least
    0.00001: below that SGLang takes the likeliest token, and reports log-probs at 1."""
    top_p: Fraction = 1.0
    """Sample only from the likeliest tokens up to this share of the probability; 1 from all."""
    top_k: int = Field(default=-1, ge=-1)
    """-1 samples from the whole vocabulary."""
    max_response_len: Positive | None = None
    """In tokens. None: what the tiny task needs, otherwise 1024."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the model's own end-of-sequence tokens."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Tokens that end a response, besides those that the model's files and its tokenizer name."""
    skip_special_tokens: bool = False
    """Leave all special tokens out of a response's text. False leaves out only the token that ended
    it, so that rewards see `<think>` and `<answer>` where these are tokens of their own."""
    include_stop_str_in_output: bool = False
    """Keep the string of `stop` that ended a response in its text, such as `</answer>` for a reward
    that looks for it. The tokens are trained on in any case."""
    dynamic_sampling: bool = False
    """Leave out groups whose rewards are all equal, which teach nothing, and draw further prompts
    until `rollout_batch_size` groups are left (DAPO)."""
    dynamic_sampling_max_rounds: Positive = 10
    """So often it draws for one step; then it trains on what there is, and the report says so."""
    over_sampling_batch_size: Positive | None = None
    """Prompts sent to the engine at once; as soon as `rollout_batch_size` groups are finished, the
    rest is aborted. Prefers short responses, and which groups are first depends on the machine's
    timing: the same seed need not give the same samples. None sends what the step needs."""
    partial_rollout: bool = False
    """Keep what was aborted, with its tokens, and continue it in the next rollout, with the weights
    of then. It waits in the session's buffer, which is part of a checkpoint."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Do not train on tokens of continued responses that older weights wrote."""


class EngineConfig(Section):
    """The SGLang engine: precision, KV cache, parallelism, timeouts."""

    mem_fraction_static: Fraction | None = None
    """Share of the device for engine weights and KV cache; None lets the kit choose. GPU only."""
    max_total_tokens: Positive | None = None
    """Size of each replica's KV cache in tokens; None lets the kit (CPU) or SGLang (GPU) choose."""
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = "auto"
    """Dtype of the keys and values that the engine keeps (SGLang's kv_cache_dtype); auto is the
    model's. fp8_e4m3 takes a byte a number, and rounds what the trainer does not:
    `training.use_tis` is then on where it is left open."""
    attention_backend: str = "auto"
    """SGLang's name for it; auto is Triton on a GPU, and the kit's own on a CPU, where no other is
    taken."""
    max_running_requests: Positive | None = None
    """Requests decoded together, over all replicas; None takes a whole rollout."""
    replicas: Positive | None = None
    """Engines side by side, each with all weights and a share of the cores and of the prompts. None
    takes, on a CPU, two for a small model, else one; on GPUs as many as trainers' devices hold."""
    tensor_parallel: Positive = 1
    """Devices that one engine divides its weights over (SGLang's tp_size)."""
    data_parallel: Positive = 1
    """Into how many parts one engine's attention divides the requests (SGLang's dp_size, with
    enable_dp_attention); a divisor of `tensor_parallel`. GPU only."""
    lora: Literal["auto", "merged", "adapter"] = "auto"
    """How the adapters of `model.lora` reach the engine: `merged` into its weights by each sync, or
    as SGLang's own beside weights that stay, a new `adapter` for each version. auto: merged."""
    max_loras_per_batch: Positive = 4
    """Adapters that one batch may have, each with room of its own on the device, where `lora` is
    adapter (SGLang's max_loras_per_batch)."""
    speculative: SpeculativeConfig | None = None
    """Draft several tokens and verify them at once; null writes one after the other."""
    update_weight_buffer_size: Annotated[int, Field(ge=1 << 20)] = 512 << 20
    """Bytes of a bucket in which weights travel from the trainer to the engine; two are held. A
    tensor that is larger has a bucket to itself. GPU only."""
    weight_bits: Annotated[int, Field(ge=2, le=16)] | None = None
    """Round each row of every weight matrix to so many bits on its way to the engine, as a
    quantised engine has them; None does not. The trainer's weights stay as they are."""
    quantization: QuantizationConfig | None = None
    """Quantise the engine's weights alone, fp8 or int4, and leave the trainer's as they are:
    `training.use_tis` is then on where it is left open. null does not."""
    weight_noise: float = Field(default=0.0, ge=0.0)
    """Add normal noise to every weight matrix on its way to the engine, anew at each sync: its
    standard deviation, as a share of the root mean square of the matrix's row. To see what
    corrections such as `training.use_tis` mend."""
    start_timeout: float = Field(default=600.0, gt=0.0)
    """Seconds that starting Ray, engine and trainer may take."""
    call_timeout: float = Field(default=1800.0, gt=0.0)
    """Seconds that one call of engine or trainer may take."""
    health_interval: float = Field(default=1.0, gt=0.0)
    """Seconds between two looks whether the processes of Ray, engine and trainer still live."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further `sglang.ServerArgs` fields; keys are checked against SGLang's own."""

    @property
    def rounds_alone(self) -> bool:
        """Whether the engine computes with lower precision than the trainer."""
        return self.quantization is not None or self.kv_cache_dtype != "auto"

    @property
    def disturbed(self) -> bool:
        """Whether the engine gets other weights than the trainer's, by rounding or by noise."""
        return bool(self.weight_bits or self.weight_noise)


class MemoryConfig(Section):
    """Limits and offloading of device memory; see `session.memory_plan()`."""

    device_gib: Above0 | None = None
    """Most that the session may take of the device, in GiB; None takes what the card has."""
    sleep: Literal["auto", "never", "always"] = "auto"
    """Whether the engine releases its memory while the trainer works, and the trainer its own while
    the engine generates. auto: as far as it is needed to fit. GPU only."""
    snapshots_gib: Above0 | None = None
    """Most host memory that snapshots may hold together, in GiB; None: as far as there is room."""


class CheckpointConfig(Section):
    """When checkpoints are saved by themselves, and how many are kept."""

    interval: int = Field(default=0, ge=0)
    """Save a checkpoint every so many steps; 0 only when asked. One that cannot be written is a
    warning, and training goes on."""
    keep_last: Positive | None = None
    """How many checkpoints that are numbered by step stay, the newest; None keeps all."""


class EvaluationConfig(Section):
    """Held-out mean reward, accuracy and pass@k."""

    interval: int = Field(default=0, ge=0)
    """Evaluate every so many steps of `train`, and before its first one; 0 only when asked."""
    skip_eval_before_train: bool = False
    """Leave out the evaluation before the first step, which `interval` otherwise asks for. Weights
    that were evaluated already are not evaluated again."""
    n_samples_per_prompt: Positive = 1
    """Responses to each held-out prompt; several give pass@k."""
    temperature: NonNegative = 0.0
    """0 is greedy."""
    max_prompts: Positive | None = None
    """Only the first so many held-out prompts; None takes all."""


class MismatchConfig(Section):
    """How far log-probs of trainer and engine may differ before it counts as a mismatch."""

    interval: int = Field(default=0, ge=0)
    """Check trainer against engine every so many steps of `train`; 0 only when asked."""
    warn_above: Above0 | None = None
    """Mean |trainer - rollout| log-prob; None: 1e-5 in float32, 2e-3 where activations are in FP8
    (`model.quantization`); in bfloat16 0.02, or twice what rounding does to Transformers' log-probs
    of the same samples, measured where the mean is higher."""
    fail_above: Above0 | None = None
    """None: 1e-3 in float32, 0.02 where activations are in FP8, 0.1 in bfloat16."""
    on_start: Literal["refuse", "warn", "skip"] = "refuse"
    """What happens at the start if trainer or engine computes the model otherwise than Transformers
    does. A weight that would not reach the engine is always refused. `skip` does not look."""


class StackConfig(Section):
    """How long the session's processes outlive whoever drives them."""

    lease: NonNegative = 300.0
    """Seconds that they wait for `RLSession.attach` when the notebook's kernel was killed or
    restarted. In a batch run they end with it, whatever is set here."""
    keep_warm: NonNegative = 0.0
    """Seconds that they wait after `close` for the next start with the same engine settings, which
    then takes about a second; 0 ends them."""
