"""Findings on model weights and prompts: present and complete, or how to get them."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from kit.config import SHIPPED, DataConfig, ModelConfig, SessionConfig
from kit.data.sources import Split, eval_sources, hub_source, load_prompts
from kit.doctor.machine import program
from kit.errors import ConfigError, KitError
from kit.models import families
from kit.models.adapters import AdapterShape
from kit.models.source import (
    DIRECTORIES,
    ModelSource,
    broken_weights,
    cached,
    find,
    is_hub_name,
    size_of,
)
from kit.reports.diagnostics import Finding, Level
from kit.rewards import build
from kit.rollout.drafts import find_draft
from kit.utils.formatting import count, data_size
from kit.utils.reading import read_json

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of these is in every model directory that can be used."""
TEMPLATES = ("chat_template.jinja", "chat_template.json")
LARGE_FILE = 500 << 20
"""Bytes of a file of prompts that are read at the start of a session, but not to look."""


def expected_bytes(config: ModelConfig) -> int | None:
    """Bytes of the model's weights: of local files, or guessed from its name; None if unknown."""
    path = _local(config.name)
    return (size_of(path) if path else 0) or _guessed_bytes(config.name)


def model(config: SessionConfig) -> Iterator[Finding]:
    """The model's files, then what its tokenizer lacks."""
    name = config.model.name
    hub, path = is_hub_name(name), _local(name)
    if hub and path is None:
        yield _not_here(name)
        return
    if path is not None:
        broken = broken_weights(path)
        if not size_of(path) and not broken:
            broken = ["there is no safetensors file"]
        if hub and not (path / "config.json").is_file():
            broken.insert(0, "config.json is missing")
        if not any((path / file).is_file() for file in TOKENIZERS):
            broken.append("there is no tokenizer")
        if broken:
            yield _incomplete(name, path, broken, hub)
            return
    try:
        found = _find(config.model, path)
    except KitError as error:
        yield Finding.of_error("model", error)
        return
    where = "it ships with the kit" if name in SHIPPED else f"in {found.path}"
    size = data_size(found.bytes)
    yield Finding("model", "ok", f"{name}, {found.architecture}, {size}; whole, {where}")
    if config.data.apply_chat_template and not _has_template(Path(found.path)):
        yield Finding(
            "chat template",
            "problem",
            f"{name} has none, as base models do.",
            "Set data.apply_chat_template: false, to give it prompts as plain text.",
        )


def source(config: ModelConfig) -> ModelSource | None:
    """Source of the model, if all of it is on this machine."""
    path = _local(config.name)
    try:
        return _find(config, path) if path else None
    except KitError:
        return None


def family(config: SessionConfig, source: ModelSource, device: str) -> Iterator[Finding]:
    """Why a session refuses a model's family; a word on one that has no record."""
    record = families.find(source.architecture)
    try:
        record.check(config, source.path, device)
    except KitError as error:
        yield Finding.of_error("family", error)
        return
    if not record.name:
        words = "was not tried; a start compares trainer and engine with Transformers"
        yield Finding("family", "ok", f"{source.architecture} {words}")


def quantization(config: SessionConfig, source: ModelSource, device: str) -> Finding:
    """What is quantised of a model, or why it cannot be."""
    from kit.models.low_precision import check_session

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is among the words
            check_session(config, source, device)
    except KitError as error:
        return Finding.of_error("quantisation", error)
    return Finding("quantisation", "ok", config.quantized)


def draft(config: SessionConfig, source: ModelSource) -> Finding:
    """What drafts for a model, or why it cannot."""
    own = config.engine.speculative
    assert own is not None
    name = own.draft_model
    if name is not None and is_hub_name(name) and _local(name) is None:
        return _not_here(name, "draft", "engine.speculative.draft_model")
    try:
        found = find_draft(config, source)
    except KitError as error:
        return Finding.of_error("draft", error)
    words = f"n-grams of the text so far, {own.draft_tokens} tokens at once"
    if found is not None:
        learns = "learns along" if config.training.draft else "stays as it is"
        name = own.draft_model or "a layer of the model's own"
        words = f"{name}, {found.architecture}, {data_size(found.bytes)}; it {learns}"
    return Finding("draft", "ok", words)


def adapters(config: ModelConfig, source: ModelSource) -> tuple[Finding, AdapterShape | None]:
    """What `model.lora` trains of a model, or what is wrong with it."""
    try:
        shape = AdapterShape.of(config, source)
    except ConfigError as error:
        return Finding.of_error("adapters", error), None
    kept = data_size(12 * shape.parameters)  # in float32, with two moments
    words = f"{shape.parameters:,} parameters in {count(shape.modules, 'layer')}"
    words += f", {kept} with their optimizer; all other weights are frozen"
    return Finding("adapters", "ok", words), shape


def _find(config: ModelConfig, path: Path | None) -> ModelSource:
    # By its directory where there is one, so that nothing is asked of the hub.
    known = path is not None and config.name not in SHIPPED
    return find(config.model_copy(update={"name": str(path)}) if known else config)


def _local(name: str) -> Path | None:
    """The directory that holds the model, whole or not; None where there is none."""
    if name in DIRECTORIES:
        return DIRECTORIES[name]
    if is_hub_name(name):
        return cached(name)
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def _not_here(name: str, what: str = "model", setting: str = "model.name") -> Finding:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    size = _guessed_bytes(name)
    about = f", about {data_size(size)} to judge by its name" if size else ""
    offline = " (HF_HUB_OFFLINE is set, so no start will fetch it)" * constants.HF_HUB_OFFLINE
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    tight = " That is too little; set HF_HOME to a folder on a larger disk." * (free < (size or 0))
    return Finding(
        what,
        "problem",
        f"{name}{about}, is not in the Hugging Face cache {cache}{offline}.",
        f"Where there is a network, the first command fetches it into that cache "
        f"({data_size(free)} free; HF_HOME moves it).{tight} For a machine without one, take the "
        f"second command on another, copy the folder here, and set {setting} to its path.",
        (
            f"{program('hf')} download {name}",
            f"hf download {name} --local-dir {name.rpartition('/')[2]}",
        ),
    )


def _incomplete(name: str, path: Path, broken: list[str], hub: bool) -> Finding:
    found = f"{name} is not whole in {path}: {'; '.join(broken[:4])}"
    found += f"; and {len(broken) - 4} more." if len(broken) > 4 else "."
    if not hub:
        return Finding("model", "problem", found, "Copy or download the directory again.")
    return Finding(
        "model",
        "problem",
        found,
        "Where there is a network, this fetches what is missing. If the cache was copied from "
        f"another machine, copy all of {path.parents[1].name} with its links and blobs "
        "(rsync -a, or tar).",
        (f"{program('hf')} download {name}",),
    )


def _guessed_bytes(name: str) -> int | None:
    """Bytes of bfloat16 weights, guessed from a name such as Qwen3-0.6B."""
    sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)B(?![\w.])", name)
    # Names count without embeddings that are kept twice; hence a quarter more.
    return int(float(sizes[0]) * 2.5e9) if sizes else None


def _has_template(path: Path) -> bool:
    if any((path / file).is_file() for file in TEMPLATES):
        return True
    try:
        settings = read_json(path / "tokenizer_config.json", unique=False)
        return bool(settings.get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def data(config: SessionConfig) -> Iterator[Finding]:
    """Training prompts, held-out prompts, and the reward that they are graded by."""
    reward = config.reward.name
    places: list[tuple[str, Split, DataConfig]] = [("prompts", "train", config.data)]
    for each, settings in eval_sources(config.data).items():
        places.append((f"held-out prompts {each}".strip(), "eval", settings))
    seen = ""
    for name, split, settings in places:
        hub = hub_source(settings, split=split, model_name=config.model.name)
        if hub:
            found = _hub_dataset(name, hub)
            again = f"the held-out split of {hub}, as above"
            yield found if hub != seen else Finding(name, found.level, again)
            seen = hub
            continue
        file = Path(settings.source if split == "train" else str(settings.eval_source))
        if file.is_file() and file.stat().st_size > LARGE_FILE:
            yield Finding(name, "ok", f"{file}, {data_size(file.stat().st_size)}; not read now")
            continue
        try:
            prompts = load_prompts(
                settings, split=split, model_name=config.model.name, seed=config.seed
            )
        except KitError as error:
            yield Finding.of_error(name, error)
            continue
        if prompts is None:
            fix = "Set data.eval_source, if accuracy is to be measured."
            level: Level = "problem" if config.evaluation.interval else "note"
            yield Finding(name, level, "none, so session.evaluate() cannot work", fix)
            continue
        reward = reward or prompts.default_reward
        yield Finding(name, "ok", f"{len(prompts):,} rows of {prompts.source}")
    try:
        built = build(config.reward, reward or "exact")
    except KitError as error:
        yield Finding.of_error("reward", error)
        return
    known = "the one that fits the labels" if not (reward or config.reward.weights) else built.name
    yield Finding("reward", "ok", known)


def _hub_dataset(name: str, source: str) -> Finding:
    repository, _, part = source.partition(":")
    prepared = _prepared(repository, part)
    if prepared:
        return Finding(name, "ok", f"{source}, in the cache of datasets ({prepared})")
    snapshot = _snapshot(repository)
    if snapshot is not None:
        return Finding(
            name,
            "note",
            f"{source} is downloaded ({snapshot}), but not yet in the form that datasets keeps.",
            "The first start makes that, and asks the hub for it. Without a network, set "
            f"data.source and data.eval_source to {snapshot / part}, or to where its files are.",
        )
    short = repository.rpartition("/")[2]
    folder = f"{short}/{part}" if part else short
    load = ", ".join(repr(word) for word in (repository, part) if word)
    return Finding(
        name,
        "problem",
        f"{source} is no file here and not in the cache of datasets ({_datasets_cache()}).",
        "Where there is a network, the first command fetches it into that cache. For a machine "
        f"without one, take the second command on another, copy the folder {short} here, and set "
        f"data.source and data.eval_source to {folder}, or to where its files are.",
        (
            f'{program("python")} -c "from datasets import load_dataset; load_dataset({load})"',
            f"hf download {repository} --repo-type dataset --local-dir {short}",
        ),
    )


def _prepared(repository: str, part: str) -> Path | None:
    """The folder in which `datasets` keeps what it has loaded before, as it lays it out:
    owner___name/configuration/version/fingerprint.
    """
    owner, _, short = repository.partition("/")
    snake = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", short))
    folder = _datasets_cache() / f"{owner}___{snake.lower()}"
    found = sorted(folder.glob(f"{part or '*'}/*/*/dataset_info.json"))
    whole = [file.parent for file in found if not file.parent.name.endswith(".incomplete")]
    return whole[0].parents[1] if whole else None


def _snapshot(repository: str) -> Path | None:
    """Where the hub's cache keeps the files of a dataset; `datasets` uses them while online."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _datasets_cache() -> Path:
    """The cache of `datasets`, whose import would take seconds, read from the environment."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
