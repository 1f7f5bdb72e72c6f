"""The section `engine.speculative`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kit.config.section import Positive, Section

HeadKind = Literal["eagle", "eagle3", "mtp"]
"""Drafts that read the model's hidden states."""


class SpeculativeConfig(Section):
    """Speculative decoding: something cheap drafts tokens, and the model verifies several at once.

    Responses are those of plain decoding; what is drafted well is written faster.
    """

    algorithm: Literal["ngram", "standalone", "eagle", "eagle3", "mtp"] = "ngram"
    """What drafts. `ngram`: the text so far, of this request and of those beside it. `standalone`:
    a smaller model with the same vocabulary. `eagle`: a head of one layer on the model's own hidden
    states. `eagle3`: one on the outputs of three of its layers, with words of its own. `mtp`: the
    layer that the model brings along to predict a further token (MiMo, GLM-4.5); SGLang calls this
    EAGLE, too."""
    num_steps: Positive | None = None
    """Tokens that a draft is long, at most; None takes 3 (SGLang's speculative_num_steps). Not for
    `ngram`."""
    eagle_topk: Positive | None = None
    """Ways in which each drafted token may go on: 1 drafts a chain, more a tree; None takes 1
    (SGLang's speculative_eagle_topk). Not for `ngram`."""
    num_draft_tokens: Annotated[int, Field(ge=2)] | None = None
    """Tokens that the model verifies at once, its own last one included (SGLang's
    speculative_num_draft_tokens). None takes 8 for `ngram`, `num_steps` + 1 for a chain, and as
    many as a tree has, at most 8."""
    draft_model: str | None = None
    """Directory or Hugging Face name of the model or the head that drafts; not for `ngram`, nor for
    `mtp`, which is part of the model."""
    when: Literal["always", "auto"] = "always"
    """`auto` measures passes with drafts and without, for so many requests at once, and takes the
    faster: drafts pay where few are written. `standalone` with chains only."""

    @model_validator(mode="after")
    def _of_the_algorithm(self) -> Self:
        if self.when == "auto" and (self.algorithm != "standalone" or self.topk > 1):
            raise ValueError(
                "engine.speculative.when is auto, which only chains of standalone drafts can be. "
                "What to do: leave when out, or set algorithm: standalone and eagle_topk: 1."
            )
        if self.algorithm == "ngram":
            for name in ("num_steps", "eagle_topk", "draft_model"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"engine.speculative.{name} is {getattr(self, name)!r}, and ngram drafts "
                        "without a model. What to do: leave it out, or set algorithm: standalone "
                        "or eagle."
                    )
            return self
        if self.algorithm == "mtp":
            if self.draft_model is not None:
                raise ValueError(
                    f"engine.speculative.draft_model is {self.draft_model!r}, and mtp drafts with "
                    "a layer of the model itself. What to do: leave it out, or set algorithm: "
                    "standalone, eagle or eagle3."
                )
        elif self.draft_model is None:
            what = {
                "standalone": "a smaller model with the same vocabulary",
            }.get(
                self.algorithm,
                "a head that was made for this model (kit draft MODEL OUT --algorithm "
                f"{self.algorithm})",
            )
            raise ValueError(
                f"engine.speculative.algorithm is {self.algorithm}, and no draft_model is named. "
                f"What to do: name {what}, or set algorithm: ngram."
            )
        most = 1 + self.topk + (self.steps - 1) * self.topk**2
        wrong = self.draft_tokens > most or (self.topk == 1 and self.draft_tokens != most)
        if wrong:
            rule = f"{most}" if self.topk == 1 else f"at most {most}"
            raise ValueError(
                f"engine.speculative.num_draft_tokens is {self.num_draft_tokens}; with num_steps "
                f"{self.steps} and eagle_topk {self.topk} it is {rule}. What to do: leave it out, "
                "or change one of them."
            )
        return self

    @property
    def head(self) -> HeadKind | None:
        """What reads the model's hidden states; None where nothing does."""
        if self.algorithm == "ngram" or self.algorithm == "standalone":
            return None
        return self.algorithm

    @property
    def has_weights(self) -> bool:
        """Whether what drafts has weights, which can learn."""
        return self.algorithm != "ngram"

    @property
    def steps(self) -> int:
        """`num_steps`, or what None stands for."""
        return self.num_steps or 3

    @property
    def topk(self) -> int:
        """`eagle_topk`, or what None stands for."""
        return self.eagle_topk or 1

    @property
    def draft_tokens(self) -> int:
        """`num_draft_tokens`, or what None stands for."""
        if self.num_draft_tokens is not None:
            return self.num_draft_tokens
        if self.algorithm == "ngram":
            return 8
        if self.topk == 1:
            return self.steps + 1
        return min(8, 1 + self.topk + (self.steps - 1) * self.topk**2)
