"""`SessionConfig`: every setting of a session, in one validated tree that is YAML in and out.

    SessionConfig.load("config.yaml")        a file; what it leaves out takes its default
    SessionConfig.preset("tiny")             a preset by name
    config.dump("config.yaml")               the whole tree, defaults included
    config.replace("training.learning_rate", 3e-4)

Names are Miles' where Miles has one. An unknown key, a wrong type and settings that cannot go
together raise ConfigError before any process starts.

    schema.py       SessionConfig: the tree, YAML, presets, one key replaced
    section.py      what every section of it is
    sections.py     model, data, reward, rollout, engine, memory, evaluation, cluster, logging, ...
    speculative.py  drafts of the engine
    training.py     what an update does: estimator, loss, corrections, optimizer, critic
    counterparts.py what settings of TRL, verl and Miles are called here
    validation.py   what cannot go together, and errors that name the line and the nearest key
    changes.py      which settings may change while a session runs
    presets.py      the presets by name
"""

from __future__ import annotations

from kit.config.schema import SessionConfig, as_yaml
from kit.config.sections import (
    SHIPPED,
    TINY,
    TINY_MOE,
    UNNAMED,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LoggingConfig,
    LoraConfig,
    MemoryConfig,
    MismatchConfig,
    ModelConfig,
    QuantizationConfig,
    RewardConfig,
    RolloutConfig,
    StackConfig,
)
from kit.config.speculative import HeadKind, SpeculativeConfig
from kit.config.training import (
    MOMENTS_BYTES,
    CriticConfig,
    DraftConfig,
    MisConfig,
    Optimizer,
    TrainingConfig,
)
from kit.utils.strict_yaml import from_yaml

__all__ = [
    "MOMENTS_BYTES",
    "SHIPPED",
    "TINY",
    "TINY_MOE",
    "UNNAMED",
    "CheckpointConfig",
    "ClusterConfig",
    "CriticConfig",
    "DataConfig",
    "DraftConfig",
    "EngineConfig",
    "EvaluationConfig",
    "HeadKind",
    "LoggingConfig",
    "LoraConfig",
    "MemoryConfig",
    "MisConfig",
    "MismatchConfig",
    "ModelConfig",
    "Optimizer",
    "QuantizationConfig",
    "RewardConfig",
    "RolloutConfig",
    "SessionConfig",
    "SpeculativeConfig",
    "StackConfig",
    "TrainingConfig",
    "as_yaml",
    "from_yaml",
]
