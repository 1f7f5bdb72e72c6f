"""`SessionConfig`: the tree, YAML in and out, presets, one key replaced; see `kit.config`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from kit.config import sections
from kit.config.section import Section
from kit.config.sections import UNNAMED
from kit.config.training import TrainingConfig
from kit.config.validation import (
    check_eval_source,
    check_lora,
    check_parallel,
    check_quantization,
    check_rollout_policies,
    check_routing_replay,
    check_speculative,
    check_stop,
    check_template_kwargs,
    check_true_on_policy,
    explain,
)
from kit.errors import ConfigError, did_you_mean
from kit.utils.display import Displayed
from kit.utils.reading import UnreadableError
from kit.utils.strict_yaml import SCIENTIFIC, read_yaml


class SessionConfig(Section, Displayed):
    """All settings. `SessionConfig()` is the tiny preset's model with plain defaults."""

    name: str = UNNAMED
    """Names the session in messages and reports, and for `RLSession.attach`. A number is added to
    a preset's name while another session of this name runs."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of prompts, of sampling and of the trainer: the same seed, the same run. On
    a GPU, sums of other batches differ in last bits, so that runs part sooner or later."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is CUDA where there is one."""
    model: sections.ModelConfig = sections.ModelConfig()
    data: sections.DataConfig = sections.DataConfig()
    reward: sections.RewardConfig = sections.RewardConfig()
    rollout: sections.RolloutConfig = sections.RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    engine: sections.EngineConfig = sections.EngineConfig()
    memory: sections.MemoryConfig = sections.MemoryConfig()
    evaluation: sections.EvaluationConfig = sections.EvaluationConfig()
    checkpoint: sections.CheckpointConfig = sections.CheckpointConfig()
    mismatch: sections.MismatchConfig = sections.MismatchConfig()
    logging: sections.LoggingConfig = sections.LoggingConfig()
    stack: sections.StackConfig = sections.StackConfig()
    cluster: sections.ClusterConfig = sections.ClusterConfig()

    def __init__(self, /, **settings: Any) -> None:
        if isinstance(settings.get("model"), (str, Path)):  # its name, or its directory
            settings["model"] = {"name": str(settings["model"])}
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise explain(error, type(self)) from None

    @model_validator(mode="after")
    def _corrects_for_the_engine(self) -> Self:
        """Switch TIS on where it is left open and only the engine rounds."""
        training = self.training
        left_open = training.use_tis is None and not training.corrects_for_engine
        if self.engine.rounds_alone and left_open:
            corrected = TrainingConfig(**training.model_dump() | {"use_tis": True})
            object.__setattr__(self, "training", corrected)
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        check_rollout_policies(self.rollout, self.training)
        check_stop(self.rollout, self.reward)
        check_template_kwargs(self.data)
        check_eval_source(self.data.eval_source)
        check_parallel(self.engine)
        check_true_on_policy(self.engine, self.training)
        check_routing_replay(self.engine, self.training)
        check_speculative(self.model, self.training, self.engine, self.cluster)
        check_lora(self.model, self.training, self.engine, self.cluster)
        check_quantization(self.model, self.training, self.engine, self.cluster)
        warn, fail = self.mismatch.warn_above, self.mismatch.fail_above
        if warn and fail and warn > fail:
            raise ValueError(
                f"mismatch.warn_above {warn} is above fail_above {fail}. What to do: swap them."
            )
        if self.reward.name and self.reward.weights:
            raise ValueError(
                "reward.name and reward.weights are both set. What to do: keep one; weights: "
                f"{{{self.reward.name}: 1.0}} is the same as name: {self.reward.name}."
            )
        return self

    @classmethod
    def preset(cls, name: str) -> SessionConfig:
        """Return a preset by name. Raises ConfigError for an unknown one."""
        from kit.config.presets import PRESETS

        if name not in PRESETS:
            raise ConfigError(f"There is no preset {name!r}.", fix=did_you_mean(name, PRESETS))
        return cls(**PRESETS[name])

    @classmethod
    def load(cls, path: str | Path) -> SessionConfig:
        """Read a YAML file. Raises ConfigError if it is missing, malformed or wrong."""
        file = Path(path)
        if not os.path.lexists(file) or file.is_dir():
            raise ConfigError(
                f"There is no configuration file {str(file)!r}.",
                fix="check the path; SessionConfig.preset('tiny').dump('config.yaml') writes one.",
            )
        try:
            tree = read_yaml(file)
        except (OSError, UnreadableError) as error:
            raise ConfigError(f"{file} is not valid YAML.", why=f"{error}.") from None
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
        """Resolve what `RLSession.start` takes.

        A configuration, a preset's name, a YAML file, a model's directory, or its name on the hub.
        """
        if isinstance(config, SessionConfig):
            return config
        if not isinstance(config, (str, Path)):
            raise ConfigError(
                f"A configuration was expected, not {config!r} ({type(config).__name__}).",
                fix="give a preset's name ('tiny'), the path of a YAML file or of a model, or a "
                "SessionConfig.",
            )
        text, path = str(config), Path(config).expanduser()
        starts_as_path = text.startswith((".", "/", "~"))
        is_path = isinstance(config, Path) or starts_as_path or path.suffix in (".yaml", ".yml")
        if not is_path and "/" not in text:
            return cls.preset(text)
        if path.is_dir():
            return cls(model=path)
        return cls.load(path) if is_path else cls(model=text)

    def to_yaml(self) -> str:
        """The whole tree as YAML, defaults included."""
        return as_yaml(self.model_dump(mode="json"))

    def dump(self, path: str | Path) -> Path:
        """Write the whole tree; `load` reads it back equal."""
        target = Path(path)
        target.write_text(self.to_yaml(), encoding="utf-8")
        return target

    def replace(self, key: str, value: Any) -> SessionConfig:
        """Return a changed copy, validated again: `config.replace("training.num_rollout", 5)`."""
        tree: dict[str, Any] = self.model_dump(mode="json")
        *path, last = key.split(".")
        branch = tree
        for section in path:
            if not isinstance(branch.get(section), dict):
                raise ConfigError(
                    f"There is no section {section!r} in {key!r}.", fix=did_you_mean(section, tree)
                )
            branch = branch[section]
        branch[last] = value
        return type(self)(**tree)

    @property
    def samples_at_once(self) -> int:
        """Samples sent to the engine at once: a step's, or more with over-sampling."""
        prompts = self.rollout.over_sampling_batch_size or self.training.rollout_batch_size
        return prompts * self.training.n_samples_per_prompt

    @property
    def records_experts(self) -> bool:
        """Whether the engine is to report the experts of a mixture of experts."""
        asked = self.engine.extra.get("enable_return_routed_experts")
        return bool(self.training.use_rollout_routing_replay or asked)

    @property
    def quantization(self) -> sections.QuantizationConfig | None:
        """How the engine's weights are quantised, alone or with the trainer's; None if not."""
        return self.model.quantization or self.engine.quantization

    @property
    def drafts(self) -> str:
        """What drafts, in words; empty where nothing does."""
        own = self.engine.speculative
        if own is None:
            return ""
        if not own.has_weights:
            return f"n-grams, {own.draft_tokens} tokens a pass"
        learns = "learns along" if self.training.draft else "frozen"
        shape = "a chain" if own.topk == 1 else "a tree"
        kinds = {
            "eagle": "an EAGLE head",
            "eagle3": "an EAGLE-3 head",
            "mtp": "its own MTP layer",
            "standalone": "a model",
        }
        kind = kinds[own.algorithm]
        return f"{kind}, {learns}: {shape} of {own.draft_tokens - 1} tokens"

    @property
    def quantized(self) -> str:
        """The quantisation in words, and what corrects for it; empty without one."""
        both = [f"{how} in trainer and engine"] if (how := self.model.quantization) else []
        alone = [str(how)] if (how := self.engine.quantization) else []
        if self.engine.kv_cache_dtype != "auto":
            alone.append(f"keys and values in {self.engine.kv_cache_dtype}")
        if alone:
            ways = ("use_tis", "mis", "use_rollout_logprobs")
            on = [f"training.{name}" for name in ways if getattr(self.training, name)]
            corrects = f"{(on or ['nothing'])[0]} corrects for it"
            both.append(f"{' and '.join(alone)} in the engine alone; {corrects}")
        return "; ".join(both)

    @property
    def engine_reads_others(self) -> bool:
        """Whether the model's files hold other weights than the engine has to start with."""
        adapters = self.model.lora
        return self.engine.disturbed or (adapters is not None and adapters.changes_model)

    def __str__(self) -> str:
        return self.to_yaml()


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes the strings that `from_yaml` would read as numbers."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+0123456789."))


def as_yaml(tree: dict[str, Any]) -> str:
    """Settings as YAML that `SessionConfig.load` reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
