"""What the kit knows of each family of models, beyond what Transformers says of it.

A family without a record is tried like any other: `kit.diagnostics.agreement` compares engine and
trainer with Transformers at every start. A record adds what a comparison cannot find out: what the
engine has to be told, what of SGLang has to be mended, and what beyond plain training is known to
be right. docs/models.md says how to write one.

record.py       `Family`, and what is refused of a family that does not have it
exact.py        what `training.true_on_policy` is refused with
llama.py        Llama, and decoders that differ from it in a detail
mistral.py      Mistral, Mixtral, StarCoder2: windows in every layer
qwen.py         Qwen2, Qwen3, their mixtures of experts, and those with linear attention
gemma.py        Gemma, Gemma 2, Gemma 3
olmo.py         OLMo, OLMo 2, OLMo 3, OLMoE
phi.py          Phi, Phi-3
glm.py          GLM, GLM-4, GLM-4.5
cohere.py       Cohere, Cohere 2
granite.py      Granite, Granite MoE
deepseek.py     DeepSeek-V3
gpt_oss.py      gpt-oss
others.py       families of one model
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from kit.models.families.record import Family, check_rotation

__all__ = ["MODULES", "Family", "all_families", "check_rotation", "find"]

MODULES = (
    "llama",
    "mistral",
    "qwen",
    "gemma",
    "olmo",
    "phi",
    "glm",
    "cohere",
    "granite",
    "deepseek",
    "gpt_oss",
    "others",
)
"""Files of records, in the order in which they are shown."""


@cache
def all_families() -> tuple[Family, ...]:
    """Every record."""
    modules = [import_module(f"{__name__}.{name}") for name in MODULES]
    return tuple(family for module in modules for family in module.FAMILIES)


def find(architecture: str) -> Family:
    """The record of an architecture, by its name in config.json; an empty one where none is."""
    for family in all_families():
        if family.architecture == architecture:
            return family
    return Family(architecture)
