"""Llama, and decoders that differ from it in a detail."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "Llama",
        exact=True,
        quantizes=True,
        adapts=True,
        engine_adapts=True,
        drafts=True,
        heads=True,
        eagle3=True,
    ),
    Family(
        "ArceeForCausalLM",
        "Arcee",
        "squared ReLU without a gate",
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Ernie4_5ForCausalLM",
        "Ernie 4.5",
        "rotation of neighbouring pairs",
        adapts=True,
        drafts=True,
    ),
    Family(
        "HeliumForCausalLM", "Helium", "rotation of neighbouring pairs", adapts=True, drafts=True
    ),
    Family(
        "PersimmonForCausalLM",
        "Persimmon",
        "norms of q and k, squared ReLU, biases",
        adapts=True,
        drafts=True,
    ),
    Family("SeedOssForCausalLM", "Seed-OSS", "biases of q, k and v", adapts=True, drafts=True),
    Family("SmolLM3ForCausalLM", "SmolLM3", "layers without rotation", adapts=True, drafts=True),
)
