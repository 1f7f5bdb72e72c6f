"""What the kit changes in SGLang's processes, read from SGLang 0.5.16.

A scheduler that is prepared by us. SGLang's engine starts its scheduler through an attribute of its
class; ours names a function that first registers what follows, and on a CPU `kit.engine.cpu`. It
has to be found by name, because beside a GPU a new interpreter runs it.
    relies on   entrypoints/engine.py: Engine.run_scheduler_process_func
                managers/scheduler.py: run_scheduler_process

A prefix cache that gives its memory back when it is emptied. It is a tree whose nodes know their
parents and their children, each with the places of its tokens as a tensor on the device. Where the
whole tree is dropped, as after each sync, its nodes hold each other until Python looks for such
circles, which it does ever more seldom: 1.3 MiB more of the card's memory a step were in use where
256 responses of 1,000 tokens were written.
    relies on   mem_cache/radix_cache.py: RadixCache.reset, root_node; TreeNode.children, parent,
                value

Checksums that a GPU does not have to compile first, and weights that can be erased, to see what a
sync writes.
    relies on   utils/weight_checker.py: WeightChecker.handle, _get_model, _hash_tensor

What a family of models needs; see `kit.engine.families`.

Where schedulers write how busy they are: a file in shared memory, which SGLang removes never. Ours
lies in the stack's own folder, and goes with it however the engine ends.
    relies on   managers/load_snapshot.py: shm_path_for, which scheduler and tokenizer manager call

The import of the one model that is served, and not of all two hundred, which take a core two
seconds and more in each scheduler of each start.
    relies on   models/registry.py: EntryClass, and the two environment variables below, which are
                in environ.py
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.engine import adapters, families
from kit.engine.drafts import scheduler as drafts_scheduler
from kit.utils.reading import read_object

if TYPE_CHECKING:
    from kit.config import QuantizationConfig
    from kit.engine.drafts.settings import SpeculativeSettings
    from kit.engine.server_args import EngineSettings


def engine_class(settings: EngineSettings) -> Any:
    """SGLang's engine, with a scheduler that does what the kit needs."""
    from sglang.srt.entrypoints.engine import Engine

    shared = settings.model_path if settings.shares_operators else None
    path, adapts = settings.model_path, settings.adapters is not None
    further = settings.quantization, settings.speculative
    run = partial(run_on_cpu, settings.threads, shared, path, adapts, *further)
    if settings.device != "cpu":
        run = partial(run_on_gpu, shared, path, adapts, *further)
    if settings.quantization:  # this process checks the name
        from kit.engine import quantization

        quantization.register(settings.quantization, shares_operators=shared is not None)
    place_load_files()  # for the tokenizer manager, which reads them
    if adapts:
        adapters.release_what_is_aborted()

    class OurEngine(Engine):
        run_scheduler_process_func = staticmethod(run)

    return OurEngine


def run_on_cpu(
    threads: int,
    shared: str | None,
    path: str,
    adapts: bool,
    quantized: QuantizationConfig | None,
    drafts: SpeculativeSettings | None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """The scheduler on a CPU: operators of ours for those that SGLang has for GPUs only.

    Args:
        threads: cores that its arithmetic takes.
        shared: the model's directory, where it computes with the trainer's operators.
        path: the model's directory.
        adapts: whether it has adapters beside its weights.
        quantized: how its linear layers are quantised.
        drafts: how it drafts, if it does.
        args: SGLang's own.
        kwargs: SGLang's own.
    """
    import torch
    from sglang.srt.managers.scheduler import run_scheduler_process

    from kit.engine import sampling
    from kit.engine.cpu import attention, operators

    torch.set_num_threads(threads)
    for part in (attention, operators, sampling):
        part.register()
    if shared:
        from kit.engine.cpu import shared as shared_operators

        shared_operators.register(shared)
    if quantized:
        from kit.engine import quantization

        quantization.register(quantized, shares_operators=shared is not None)
    if adapts:
        adapters.register("cpu")
    if drafts:
        from kit.engine.cpu import speculative as on_cpu

        on_cpu.register(whole_draft=drafts.is_model)
    _register_on_both("cpu", path, drafts)
    run_scheduler_process(*args, **kwargs)


def run_on_gpu(
    shared: str | None,
    path: str,
    adapts: bool,
    quantized: QuantizationConfig | None,
    drafts: SpeculativeSettings | None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """The scheduler on a GPU; arguments as those of `run_on_cpu`."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    from kit.engine.gpu import attention_inputs, decode_attention, logits, sampling, windows

    windows.register()
    decode_attention.register()
    sampling.register()
    if not shared and not drafts:
        attention_inputs.register()
        logits.register()
    if shared:
        from kit.engine.gpu import shared as shared_operators

        shared_operators.register(shared)
    if quantized:
        from kit.engine import quantization

        quantization.register(quantized, shares_operators=shared is not None)
        if quantized.method == "fp8":
            quantization.register_inputs()
    if adapts:
        adapters.register("cuda")
    if drafts:
        from kit.engine.gpu import speculative as on_gpu

        on_gpu.register(drafts)
    _register_on_both("cuda", path, drafts)
    run_scheduler_process(*args, **kwargs)


def _register_on_both(device: str, path: str, drafts: SpeculativeSettings | None) -> None:
    """Change in a scheduler what is changed on CPUs and GPUs alike, after the device's own."""
    if drafts:
        drafts_scheduler.register(drafts)
    families.register(path, device)
    if drafts and drafts.draft_path not in (None, path):
        families.register(drafts.draft_path, device)
    register_prefix_cache()
    register_weight_checks()
    place_load_files()


LOADS = "KIT_LOADS"
"""Environment variable: the folder of the files in which schedulers tell of their load."""


def place_load_files() -> None:
    """Have this process look for files of load where `LOADS` says, if it says anything."""
    from sglang.srt.managers import load_snapshot

    folder = os.environ.get(LOADS)
    if not folder or getattr(load_snapshot.shm_path_for, "folder", None) == folder:
        return
    named = load_snapshot.shm_path_for

    def path_for(name: str) -> str:
        return os.path.join(folder, os.path.basename(named(name)))

    path_for.folder = folder  # type: ignore[attr-defined]
    load_snapshot.shm_path_for = path_for


def register_prefix_cache() -> None:
    """Register a prefix cache whose emptied trees release their tensors at once."""
    from sglang.srt.mem_cache.radix_cache import RadixCache

    if getattr(RadixCache.reset, "takes_apart", False):
        return
    reset = RadixCache.reset

    def reset_and_take_apart(cache: Any) -> None:
        old = getattr(cache, "root_node", None)  # a new cache begins with a reset
        reset(cache)
        take_apart(old)

    reset_and_take_apart.takes_apart = True  # type: ignore[attr-defined]
    RadixCache.reset = reset_and_take_apart


def take_apart(root: Any) -> None:
    """Let the nodes of a tree that is no longer used go of each other and of their tensors."""
    nodes = [] if root is None else [root]
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        node.children.clear()
        node.parent = node.value = None


def register_weight_checks() -> None:
    """Give SGLang's weight checker the kit's checksum, and further actions.

    `erase` overwrites every parameter with NaN, and codes of INT4 with one that there is not: what
    a sync does not write is then easily found.
    `adapter NAME` gives the checksums of an adapter. `record` keeps what the model's parts put out
    from then on, `recorded` ends that and gives their digests in place of checksums.
    """
    import torch
    from sglang.srt.utils import weight_checker

    from kit.engine.adapters import tensors_of
    from kit.operators.ladder import Recorder
    from kit.weight_sync.verify import ADAPTER_OF, NO_CODE, checksum

    kind: Any = weight_checker.WeightChecker
    if weight_checker._hash_tensor is checksum:
        return
    weight_checker._hash_tensor = checksum
    handle = kind.handle
    recorders: list[Recorder] = []

    def handle_further(self: Any, action: str, *args: Any, **kwargs: Any) -> Any:
        if action == "erase":
            with torch.no_grad():
                for value in self._get_model().parameters():
                    if value.is_floating_point():
                        value.fill_(torch.nan)
                    elif value.dtype is torch.int8:
                        value.fill_(NO_CODE)
        elif action.startswith(ADAPTER_OF):
            sums = tensors_of(action.removeprefix(ADAPTER_OF))
            return weight_checker.ChecksumInfo(
                checksums={name: checksum(value) for name, value in sums},
                per_gpu_checksum="",
                parallelism_info=self._parallelism_info(),
            ).model_dump()
        elif action == "record":
            recorders.append(Recorder(self._get_model()))
        elif action == "recorded":
            return weight_checker.ChecksumInfo(
                checksums=recorders.pop().digests(),
                per_gpu_checksum="",
                parallelism_info=self._parallelism_info(),
            ).model_dump()
        else:
            return handle(self, action, *args, **kwargs)
        return None

    kind.handle = handle_further


DISABLED = "SGLANG_DISABLED_MODEL_ARCHS"
"""SGLang's variable for modules of models that it is not to import."""
EXTERNAL = "SGLANG_EXTERNAL_MODEL_PACKAGE"
"""SGLang's variable for a package with models of the user's own."""


OWN_MODELS = "kit.engine.models"
"""Package with the models that SGLang lacks."""


def import_only(*model_paths: str, further: Iterable[str] = ()) -> None:
    """Tell this process' SGLang, and what it starts, which models it can leave out.

    It is also told of the kit's own, where one of them is wanted. Where the architecture of one of
    the models is in none of SGLang's modules nor ours, or the environment already says something
    of this, SGLang is told nothing.

    Args:
        model_paths: directories of models.
        further: architectures that none of their config.json names.
    """
    if os.environ.get(DISABLED) or os.environ.get(EXTERNAL):
        return
    wanted = [read_object(Path(path) / "config.json", unique=False) for path in model_paths]
    names = {str(name) for settings in wanted for name in settings.get("architectures") or ()}
    names |= set(further)
    own = {name for name in names if _is_own(name)}
    others, found = [], set()
    models = sglang_sources() / "models"
    for file in sorted(file for file in models.glob("*.py") if file.stem != "__init__"):
        text = file.read_text(encoding="utf-8")
        if here := {name for name in names - own if name in text}:
            found |= here if "EntryClass" in text else set()
        else:
            others.append(file.stem)
    if own:
        os.environ[EXTERNAL] = OWN_MODELS
    if names and found | own == names:
        os.environ[DISABLED] = ",".join(others)


def _is_own(architecture: str) -> bool:
    """Whether a model of this architecture is among `OWN_MODELS`; these are not imported here."""
    files = Path(__file__).with_name("models").glob("*.py")
    return any(f"class {architecture}(" in file.read_text(encoding="utf-8") for file in files)


def sglang_sources() -> Path:
    """Folder of SGLang's sources, found without importing it, which takes ten seconds."""
    package = find_spec("sglang")
    assert package is not None
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "srt"
