"""`Sending`: what a sync has to send, and what of it the engines have already.

weights    the policy's, adapters merged into them; where adapters are sent apart, only until
the engines have the weights that those belong to
adapters   those of the session whose turn it is, where they are sent apart
a draft    every so many updates, where one is trained
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kit.config import SessionConfig
from kit.stack.slots import Slots
from kit.weight_sync.coordinator import WeightSync
from kit.weight_sync.transport import ADAPTER, DRAFT, POLICY


@dataclass(slots=True)
class Sending:
    """What the engines of one stack have, and sending them the rest."""

    adapters: bool
    """Whether adapters are sent apart from the weights."""
    files_are_base: bool
    """Whether adapters belong to the weights that an engine reads as it starts."""
    base_in_place: bool = field(init=False)
    """Whether the engines have the weights that adapters belong to."""
    draft_version: int | None = 0
    """After how many updates the engines' draft was sent; None where that is not known."""

    def __post_init__(self) -> None:
        self.base_in_place = self.files_are_base

    @classmethod
    def of(cls, config: SessionConfig) -> Sending:
        """What a stack with these settings has after its start."""
        lora = config.model.lora
        return cls(
            adapters=lora is not None and config.engine.lora == "adapter",
            files_are_base=lora is None or not lora.load_in_4bit,
        )

    def doubt(self) -> None:
        """Take for granted no longer what the engines have: somebody else had them."""
        self.base_in_place, self.draft_version = False, None

    def started_again(self) -> None:
        """Note that an engine has what the files have."""
        self.base_in_place = self.base_in_place and self.files_are_base
        self.draft_version = None

    def send(
        self,
        weights: WeightSync,
        slots: Slots,
        version: int,
        *,
        awake: bool,
        exact: bool,
        flush_cache: bool,
        erase: bool,
        draft_every: int,
    ) -> tuple[int, int]:
        """Send what the engines lack of the trainers' weights: (tensors, bytes).

        Args:
            weights: that sends.
            slots: whose turn it is.
            version: number of the weights.
            awake: whether the engines' weights are there.
            exact: without the disturbance.
            flush_cache: False keeps prefixes, which no longer fit.
            erase: overwrite the engines' weights first.
            draft_every: updates between two syncs of the draft; 0 where none is trained.

        Raises:
            StackError: they did not arrive.
        """
        tensors, size = 0, 0
        in_place, before = self.base_in_place and awake, self.draft_version
        draft = draft_every and (erase or before is None or abs(version - before) >= draft_every)
        if draft:
            self.draft_version = None
        if erase or not (self.adapters and in_place):
            self.base_in_place = False
            slots.in_engines.clear()
            tensors, size = weights.send(
                version,
                exact=exact,
                flush_cache=flush_cache,
                erase=erase,
                models=(POLICY, DRAFT) if draft and not self.adapters else (POLICY,),
            )
            self.base_in_place = True
        if self.adapters:
            slots.in_engines.discard(slots.present)  # some may have it, and not all
            adapter = slots.present.adapter
            more, larger = weights.send(
                version,
                exact=exact,
                flush_cache=flush_cache,
                models=(ADAPTER, DRAFT) if draft else (ADAPTER,),
                adapter=adapter,
            )
            tensors, size = tensors + more, size + larger
        if draft:
            self.draft_version = version
        slots.in_engines.add(slots.present)
        return tensors, size
