"""`kit.make_draft`: a small model, or a head, that drafts for another one, made from its texts."""

from __future__ import annotations

import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kit.checkpoint import manifest
from kit.config import DraftConfig, SessionConfig, SpeculativeConfig
from kit.errors import ConfigError, ModelError, did_you_mean
from kit.models import families
from kit.models.source import find
from kit.rollout.drafts import check_standalone
from kit.session import RLSession
from kit.utils.arguments import at_least_one

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.reports import StepReport

LENGTH, RATE = "rollout/spec_accept_length", "rollout/spec_accept_rate"
DraftAlgorithm = Literal["standalone", "eagle", "eagle3"]
RATES: dict[DraftAlgorithm, float] = {"standalone": 1e-3, "eagle": 3e-3, "eagle3": 3e-3}
KINDS = {"standalone": "Draft", "eagle": "EAGLE head", "eagle3": "EAGLE-3 head"}
"""Learning rate of each kind of draft. A head learns from nothing."""
AROUND = 5
"""Steps over which the acceptance at the beginning and at the end is taken."""


@dataclass(frozen=True, slots=True, repr=False)
class DraftReport:
    """A draft that was made, and how well it drafts."""

    path: Path
    algorithm: DraftAlgorithm
    layers: int
    steps: int
    before: tuple[float, float]
    """(tokens a pass, share of drafted tokens that were accepted), over the first steps."""
    after: tuple[float, float]
    """The same over the last ones."""

    @property
    def speculative(self) -> dict[str, Any]:
        """What to set `engine.speculative` to."""
        return {"algorithm": self.algorithm, "draft_model": str(self.path)}

    def __str__(self) -> str:
        (length, rate), (longer, better) = self.before, self.after
        return (
            f"{KINDS[self.algorithm]} of {self.layers} layer{'s' if self.layers > 1 else ''} in "
            f"{self.path}, from {self.steps} steps\n"
            f"  tokens a pass     {length:.2f} -> {longer:.2f}   (1 is plain decoding)\n"
            f"  drafts accepted   {rate:.0%} -> {better:.0%}\n"
            f"  To use it: engine.speculative: {{algorithm: {self.algorithm}, draft_model: "
            f"{self.path}}}"
        )

    __repr__ = __str__


def make_draft(
    config: SessionConfig | str | Path,
    path: str | Path,
    *,
    algorithm: DraftAlgorithm = "standalone",
    layers: int = 1,
    steps: int = 100,
    learning_rate: float | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> DraftReport:
    """Make a draft of a model, for `engine.speculative`.

    As `standalone` it begins with some of the model's own layers, its embeddings and its output; as
    `eagle` or `eagle3` it is a head of one layer on the model's hidden states, which begins with
    nothing. It learns to write what the model writes to the prompts of the settings, up to their
    `rollout.max_response_len`, and may draft badly what is longer. The model itself stays as it is.

    Args:
        config: as for `RLSession.start`: a preset's name, a YAML file, a model, or settings; the
            prompts are theirs.
        path: a directory for the draft.
        algorithm: `standalone`, `eagle` or `eagle3`.
        layers: of the draft; 1 for heads.
        steps: rollouts to learn from.
        learning_rate: of the draft; None takes 1e-3 for `standalone`, and 3e-3 for heads.
        on_step: called with each step's report.

    Raises:
        ConfigError: there is no such algorithm, there are not so many layers, the settings train
            adapters, or no head was tried with the model's family.
        ModelError: the model's family takes no drafts, or SGLang no draft of this family.
        CheckpointError: the draft cannot be written, or something else is there.
    """
    at_least_one(steps, "steps")
    at_least_one(layers, "layers")
    _check_kind(algorithm, layers)
    manifest.refuse_others(Path(path).absolute(), "export")  # not after a hundred steps
    rate = RATES[algorithm] if learning_rate is None else learning_rate
    config = SessionConfig.of(config)
    if config.model.lora:
        raise ConfigError(
            "A draft is made from a model without adapters.",
            fix="leave model.lora out; a draft serves the model with adapters, too.",
        )
    model = find(config.model)
    families.find(model.architecture).check_drafts()
    with tempfile.TemporaryDirectory(prefix="draft") as folder:
        if algorithm == "standalone":
            check_standalone(model.architecture, config.model.name)
            shorten(Path(model.path), Path(folder), layers)
        else:
            from kit.models.heads import making

            families.find(model.architecture).check_heads(algorithm)
            making.make(algorithm, model.path, folder, config.seed)
        training = config.training.model_copy(
            update={
                "learning_rate": 0.0,  # the policy stays
                "lr_schedule": "constant",
                "advantage_estimator": "grpo",
                "draft": DraftConfig(learning_rate=rate),
            }
        )
        engine = config.engine.model_copy(
            update={"speculative": SpeculativeConfig(algorithm=algorithm, draft_model=folder)}
        )
        own = config.model_copy(update={"training": training, "engine": engine})
        with RLSession.start(SessionConfig(**own.model_dump(mode="json"))) as session:
            found = []
            for _ in range(steps):
                report = session.step()
                found.append((report.metrics.get(LENGTH, 1.0), report.metrics.get(RATE, 0.0)))
                if on_step:
                    on_step(report)
            target = session.export_hf(path, dtype="float32", draft=True)
    means = _mean(found[:AROUND]), _mean(found[-AROUND:])
    return DraftReport(target, algorithm, layers, steps, *means)


def _check_kind(algorithm: str, layers: int) -> None:
    """Raise ConfigError for a draft that there is not."""
    if algorithm not in RATES:
        raise ConfigError(
            f"There is no draft of the kind {algorithm!r}.", fix=did_you_mean(algorithm, RATES)
        )
    if algorithm != "standalone" and layers > 1:
        raise ConfigError(
            f"An {KINDS[algorithm]} of {layers} layers is asked for.",
            why="SGLang's has one layer, as the kit has it.",
            fix="leave layers out, or take algorithm standalone.",
        )


def _mean(rows: list[tuple[float, float]]) -> tuple[float, float]:
    lengths, rates = zip(*rows, strict=True)
    return statistics.fmean(lengths), statistics.fmean(rates)


def shorten(model: Path, folder: Path, layers: int) -> None:
    """Write a model with fewer layers, which has the other's weights in those, and its tokenizer.

    Args:
        model: directory of the model.
        folder: a directory for the shorter one.
        layers: how many it has: of several, evenly spread from the first to the last.

    Raises:
        ConfigError: the model has no more layers itself.
        ModelError: its layers cannot be taken apart.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    config = AutoConfig.from_pretrained(model, local_files_only=True)
    whole = int(config.num_hidden_layers)
    if layers >= whole:
        raise ConfigError(
            f"A draft of {layers} layers is asked for, and the model has {whole}.",
            fix=f"take fewer than {whole}: a draft pays by being small.",
        )
    kept = [round(i * (whole - 1) / max(layers - 1, 1)) for i in range(layers)]
    disable_progress_bar()
    source = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    short = AutoModelForCausalLM.from_config(config)
    found = {}
    for name, value in source.state_dict().items():
        place = _LAYER.search(name)
        if place is None:
            found[name] = value
        elif (number := int(place[1])) in kept:
            found[f"{name[: place.start(1)]}{kept.index(number)}{name[place.end(1) :]}"] = value
    try:
        short.load_state_dict(found)
    except RuntimeError as error:
        raise ModelError(
            f"A draft cannot be made of {model}'s layers.",
            why=str(error),
            fix="name a smaller model with the same vocabulary as the draft.",
        ) from error
    short.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model, local_files_only=True).save_pretrained(folder)


_LAYER = re.compile(r"\.layers\.(\d+)\.")
