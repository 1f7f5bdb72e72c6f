"""`SessionConfig`: every setting of a session, in one validated tree that is YAML in and out.

    SessionConfig.load("config.yaml")        a file; what it leaves out takes its default
    SessionConfig.preset("tiny")             a preset by name
    config.dump("config.yaml")               the whole tree, defaults included
    config.replace("training.learning_rate", 3e-4)

Names are Miles' where Miles has one. An unknown key, a wrong type and settings that cannot go
together raise ConfigError before any process starts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from kit.config_base import Above0, Fraction, NonNegative, Positive, Section
from kit.config_checks import check_rollout_policies
from kit.config_cluster import ClusterConfig, check_parallel
from kit.config_errors import explain
from kit.config_logging import LoggingConfig
from kit.config_training import CriticConfig, MisConfig, TrainingConfig
from kit.errors import ConfigError, did_you_mean

__all__ = [
    "ClusterConfig",
    "CriticConfig",
    "LoggingConfig",
    "MisConfig",
    "SessionConfig",
    "TrainingConfig",
]

UNNAMED = "session"
TINY = "tiny"
"""The model that ships with the kit; see `kit/tiny/`."""


class ModelConfig(Section):
    """Which model, and how it computes."""

    name: str = TINY
    """A directory, a Hugging Face name such as Qwen/Qwen3-0.6B, or `tiny`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; auto is float32 on the CPU and bfloat16 on a GPU. Weights and optimizer
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


class DataConfig(Section):
    """Where prompts come from, and how they become tokens."""

    source: str = ""
    """Where training prompts come from: a JSONL, JSON, CSV or Parquet file, a directory saved by
    `datasets`, `tiny:TASK`, or `reasoning_gym:TASK`. A slice may follow: `train.jsonl@[0:1000]`.
    Empty takes the model's first task: tiny:addition, otherwise reasoning_gym:gsm_symbolic."""
    eval_source: str = ""
    """Held-out prompts in the same notation. Empty: the task's own held-out split where the
    source is a task, and no evaluation otherwise."""
    input_key: str = "prompt"
    """The field that holds the prompt: a string, or a list of chat messages."""
    label_key: str = "label"
    """The field that holds the right answer; rows may lack it."""
    metadata_key: str = "metadata"
    """The field that holds a mapping which reward functions can read; rows may lack it."""
    apply_chat_template: bool = True
    """Render prompts through the model's chat template; a plain string counts as one user
    message."""
    system_prompt: str = ""
    """Put in front of plain string prompts as a system message, where not empty."""
    shuffle: bool = True
    """A new order each epoch, from the seed."""
    size: Positive = 10_000
    """How many training rows a generated task (reasoning_gym) makes."""
    eval_size: Positive = 256
    """How many held-out rows a generated task (reasoning_gym) makes."""


class RewardConfig(Section):
    """What a response is worth."""

    name: str = ""
    """A built-in reward: exact, number, math, gsm8k, format, reasoning_gym. Empty takes the one
    that fits the data source, else `exact`."""
    weights: dict[str, float] = Field(default_factory=dict)
    """A weighted sum of built-in rewards instead of one, by name: {math: 0.9, format: 0.1}."""
    format_pattern: str = ""
    """The regular expression that `format` looks for in a response."""
    timeout: Above0 | None = 60.0
    """Seconds that a reward may take of one sample, which is then marked as failed; a function of
    all samples has so many for each. None waits for ever. Nothing is ended under a debugger."""


class RolloutConfig(Section):
    """How responses are sampled."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Divides the logits, in the engine and in the trainer: below 1 surer, above 1 bolder."""
    top_p: Fraction = 1.0
    """Sample only from the likeliest tokens up to this share of the probability; 1 from all."""
    top_k: int = Field(default=-1, ge=-1)
    """-1 samples from the whole vocabulary."""
    max_response_len: Positive | None = None
    """In tokens. None: what the tiny task needs, otherwise 1024."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the model's own end-of-sequence token."""
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
    """SGLang."""

    mem_fraction_static: Fraction | None = None
    """Share of the device for engine weights and KV cache; None lets the kit choose. GPU only."""
    max_total_tokens: Positive | None = None
    """Size of each replica's KV cache in tokens; None lets the kit (CPU) or SGLang (GPU) choose."""
    attention_backend: str = "auto"
    """SGLang's name for it; auto is the kit's batched backend on the CPU, Triton on a GPU."""
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
    update_weight_buffer_size: Annotated[int, Field(ge=1 << 20)] = 512 << 20
    """Bytes of a bucket in which weights travel from the trainer to the engine; two are held. A
    tensor that is larger has a bucket to itself. GPU only."""
    weight_bits: Annotated[int, Field(ge=2, le=16)] | None = None
    """Round each row of every weight matrix to so many bits on its way to the engine, as a
    quantised engine has them; None does not. The trainer's weights stay as they are."""
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
    def disturbed(self) -> bool:
        """Does the engine get other weights than the trainer's?"""
        return bool(self.weight_bits or self.weight_noise)


class MemoryConfig(Section):
    """Who holds the device when; `session.memory_plan()` shows what follows from it."""

    device_gib: Above0 | None = None
    """Most that the session may take of the device, in GiB; None takes what the card has."""
    sleep: Literal["auto", "never", "always"] = "auto"
    """Does the engine let go of its memory while the trainer works, and the trainer of its while
    the engine generates? auto: as far as it is needed to fit. GPU only."""
    snapshots_gib: Above0 | None = None
    """Most host memory that snapshots may hold together, in GiB; None: as far as there is room."""


class CheckpointConfig(Section):
    """What is kept on disk without being asked for each time."""

    interval: int = Field(default=0, ge=0)
    """Save a checkpoint every so many steps; 0 only when asked. One that cannot be written is a
    warning, and training goes on."""
    keep_last: Positive | None = None
    """Of checkpoints that are numbered by step so many stay, the newest; None keeps all."""


class EvaluationConfig(Section):
    """Held-out accuracy."""

    interval: int = Field(default=0, ge=0)
    """Evaluate every so many steps of `train`; 0 only when asked."""
    n_samples_per_prompt: Positive = 1
    """Responses to each held-out prompt; several give pass@k."""
    temperature: NonNegative = 0.0
    """0 is greedy."""
    max_prompts: Positive | None = None
    """Only the first so many held-out prompts; None takes all."""


class MismatchConfig(Section):
    """When trainer and engine count as disagreeing."""

    interval: int = Field(default=0, ge=0)
    """Check trainer against engine every so many steps of `train`; 0 only when asked."""
    warn_above: Above0 | None = None
    """Mean |trainer - rollout| log-prob; None: 1e-5 in float32, 0.02 in bfloat16."""
    fail_above: Above0 | None = None
    """None: 1e-3 in float32, 0.1 in bfloat16."""


class StackConfig(Section):
    """How long the session's processes outlive whoever drives them."""

    lease: NonNegative = 300.0
    """Seconds that they wait for `RLSession.attach` when the notebook's kernel was killed or
    restarted. In a batch run they end with it, whatever is set here."""
    keep_warm: NonNegative = 0.0
    """Seconds that they wait after `close` for the next start with the same engine settings, which
    then takes about a second; 0 ends them."""


class SessionConfig(Section):
    """The whole tree. `SessionConfig()` is the tiny preset's model with plain defaults."""

    name: str = UNNAMED
    """Names the session in messages and reports, and for `RLSession.attach`. A number is added to
    a preset's name while another session of this name runs."""
    seed: int = Field(default=0, ge=0)
    """Of prompts' order, of sampling, of what a trainer draws: the same seed, the same run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is CUDA where there is one."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    engine: EngineConfig = EngineConfig()
    memory: MemoryConfig = MemoryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mismatch: MismatchConfig = MismatchConfig()
    logging: LoggingConfig = LoggingConfig()
    stack: StackConfig = StackConfig()
    cluster: ClusterConfig = ClusterConfig()

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise explain(error, type(self), settings) from None

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        check_rollout_policies(self.rollout, self.training)
        check_parallel(self.engine)
        mismatch = self.mismatch
        if (
            mismatch.warn_above
            and mismatch.fail_above
            and mismatch.warn_above > mismatch.fail_above
        ):
            raise ValueError(
                f"mismatch.warn_above {mismatch.warn_above} is above fail_above "
                f"{mismatch.fail_above}. What to do: swap them."
            )
        if self.reward.name and self.reward.weights:
            raise ValueError(
                "reward.name and reward.weights are both set. What to do: keep one; weights: "
                f"{{{self.reward.name}: 1.0}} is the same as name: {self.reward.name}."
            )
        return self

    @classmethod
    def preset(cls, name: str) -> SessionConfig:
        """A ready configuration. Raises ConfigError for a name that is none."""
        from kit.presets import PRESETS

        if name not in PRESETS:
            raise ConfigError(f"There is no preset {name!r}.", fix=did_you_mean(name, PRESETS))
        return cls(**PRESETS[name])

    @classmethod
    def load(cls, path: str | Path) -> SessionConfig:
        """Read a YAML file. Raises ConfigError for a missing, broken or wrong one."""
        file = Path(path)
        if not file.is_file():
            raise ConfigError(
                f"There is no configuration file {str(file)!r}.",
                fix="check the path; SessionConfig.preset('tiny').dump('config.yaml') writes one.",
            )
        try:
            tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid YAML.", why=str(error)) from None
        if tree is None:
            tree = {}
        if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
            raise ConfigError(
                f"{file} holds a {type(tree).__name__}, not a mapping of settings.",
                fix="write sections such as `training:` with keys below them.",
            )
        return cls(**tree)

    @classmethod
    def of(cls, config: SessionConfig | str | Path) -> SessionConfig:
        """What `RLSession.start` accepts: a configuration, a preset's name, or a YAML file."""
        if isinstance(config, SessionConfig):
            return config
        if not isinstance(config, (str, Path)):
            raise ConfigError(
                f"A configuration was expected, not {config!r} ({type(config).__name__}).",
                fix="give a preset's name ('tiny'), the path of a YAML file, or a SessionConfig.",
            )
        if isinstance(config, Path) or config.endswith((".yaml", ".yml")):
            return cls.load(config)
        return cls.preset(config)

    def to_yaml(self) -> str:
        """The whole tree as YAML, defaults included."""
        return as_yaml(self.model_dump(mode="json"))

    def dump(self, path: str | Path) -> Path:
        """Write the whole tree; `load` reads it back equal."""
        target = Path(path)
        target.write_text(self.to_yaml(), encoding="utf-8")
        return target

    def replace(self, key: str, value: Any) -> SessionConfig:
        """A changed copy, validated again: `config.replace("training.num_rollout", 5)`."""
        tree: dict[str, Any] = self.model_dump(mode="json")
        *sections, last = key.split(".")
        branch = tree
        for section in sections:
            if not isinstance(branch.get(section), dict):
                raise ConfigError(
                    f"There is no section {section!r} in {key!r}.", fix=did_you_mean(section, tree)
                )
            branch = branch[section]
        branch[last] = value
        return type(self)(**tree)

    @property
    def rollout_size(self) -> int:
        """Samples a step."""
        return self.training.rollout_size

    @property
    def samples_at_once(self) -> int:
        """Samples that the engine is given at once: a step's, or more where it over-samples."""
        prompts = self.rollout.over_sampling_batch_size or self.training.rollout_batch_size
        return prompts * self.training.n_samples_per_prompt

    def __str__(self) -> str:
        return self.to_yaml()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from kit.viz import show_config

        return show_config(self)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as a string, which is how everybody writes a learning rate."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _end in (_Loader, _Dumper):
    _end.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def as_yaml(tree: dict[str, Any]) -> str:
    """Settings as YAML that `SessionConfig.load` reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
