"""GLM, GLM-4, GLM-4.5."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family(
        "GlmForCausalLM",
        "GLM",
        "rotation of half of each head, in neighbouring pairs",
        mends=("whole_projections",),
        adapts=True,
        drafts=True,
    ),
    Family(
        "Glm4ForCausalLM",
        "GLM-4",
        "as GLM, norms before and after each part",
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Glm4MoeForCausalLM",
        "GLM-4.5",
        "mixture of experts with shared ones and a router bias that is no parameter",
        engine={"disable_shared_experts_fusion": True},  # a further expert in the records
        mends=("routers",),
        replays=True,
        adapts=True,
        engine_adapts=True,
        drafts=True,
        mtp=True,
    ),
)
