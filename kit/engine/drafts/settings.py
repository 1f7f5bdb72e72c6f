"""How an engine drafts, and what it is told of it; the weights of a draft."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import StackError
from kit.models.heads import eagle3_files
from kit.models.heads.mtp_files import prefix_of
from kit.utils.reading import read_json

if TYPE_CHECKING:
    from kit.config import SpeculativeConfig
    from kit.models.source import ModelSource

DRAFT_OF = "draft."
"""Begins the names of a draft's weights among those of the engine."""


@dataclass(frozen=True, slots=True)
class SpeculativeSettings:
    """How an engine drafts."""

    algorithm: str
    num_steps: int
    topk: int
    num_draft_tokens: int
    draft_path: str | None = None
    """Directory of the draft, a model or a head; None where there is none. Of `mtp` it is the
    model's own: SGLang makes a model of one layer of it."""
    architecture: str = ""
    """SGLang's class of the draft; empty where there is none."""
    prefix: str = ""
    """Begins the names of a layer's weights in the files of its model, where that is the draft."""
    where_it_pays: bool = False
    """Whether it drafts only where passes were measured to give more."""

    @classmethod
    def of(cls, config: SpeculativeConfig, draft: ModelSource | None) -> SpeculativeSettings:
        """Those of a section of settings, and of what drafts."""
        numbers = config.steps, config.topk, config.draft_tokens
        path, architecture = (draft.path, draft.architecture) if draft else (None, "")
        prefix = ""
        if path and config.algorithm == "mtp":
            prefix = prefix_of(read_json(Path(path) / "config.json", unique=False))
        pays = config.when == "auto"
        return cls(config.algorithm, *numbers, path, architecture, prefix, pays)

    @property
    def has_draft(self) -> bool:
        """Whether there is a model, or a head, that drafts."""
        return self.draft_path is not None

    @property
    def is_model(self) -> bool:
        """Whether the draft is a model of its own, which reads tokens alone."""
        return self.algorithm == "standalone"

    def server_arguments(self, *, sleeps: bool) -> dict[str, Any]:
        """The fields of `sglang.ServerArgs` that say so.

        `sleeps`: the engine lets go of its weights at times. A sync then brings the policy's, and
        the draft's not always, so that they are kept in host memory meanwhile.
        """
        arguments: dict[str, Any] = {
            "speculative_algorithm": "EAGLE" if self.algorithm == "mtp" else self.algorithm.upper(),
            "speculative_num_draft_tokens": self.num_draft_tokens,
        }
        if self.has_draft:
            arguments |= {
                "speculative_draft_model_path": self.draft_path,
                "speculative_num_steps": self.num_steps,
                "speculative_eagle_topk": self.topk,
                "enable_draft_weights_cpu_backup": sleeps,
            }
        return arguments


class DraftLoader:
    """Loads weights into the draft alone; a `Loader` of `kit.weight_sync.receiver`."""

    def from_memory(
        self, manager: Any, payloads: list[bytes], **common: Any
    ) -> Awaitable[tuple[bool, str]]:
        """See `Loader`."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=payloads, **common)
        answer: Awaitable[tuple[bool, str]] = manager.update_weights_from_tensor(request, None)
        return answer

    def from_broadcast(
        self, manager: Any, group: str, spec: Any, **common: Any
    ) -> Awaitable[tuple[bool, str]]:
        """Refuse: what is broadcast reaches the target only."""
        raise StackError(
            "A draft's weights cannot be broadcast.", fix="set cluster.colocate: true."
        )


def own_of_head(named: dict[str, Any], architecture: str, prefix: str = "") -> dict[str, Any]:
    """What a head has of its own among SGLang's parameters of it, by its files' names.

    SGLang puts them below `model`, and the policy's embeddings and output beside them.

    Args:
        named: all of them.
        architecture: SGLang's class of the head.
        prefix: see `SpeculativeSettings`.
    """
    has_output = architecture == eagle3_files.ARCHITECTURE
    own = {name.removeprefix("model."): value for name, value in named.items()}
    if not prefix:
        # What an EAGLE-3 head has for its output is its own; another's is the policy's.
        begins = ("fc.", "layers.", "norm.", *(("lm_head.",) if has_output else ()))
        return {name: own[name] for name in own if name.startswith(begins)}
    shared = ("embed_tokens.weight", "lm_head.weight")
    own = {name: own[name] for name in own if name not in shared}
    return {prefix + n.removeprefix("mtp_block.").removeprefix("decoder."): own[n] for n in own}
