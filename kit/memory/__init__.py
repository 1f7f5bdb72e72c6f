"""Who may hold how much of the device, worked out before anything starts.

shape.py           the model's sizes, read from its directory
card.py            the device: its name and its memory
plan.py            the plan: what each phase holds, and what sleeps meanwhile
ways_out.py        what to change where it does not fit
for_session.py     the plan of a session, running or not
"""

from kit.memory.plan import MemoryPlan, Phase, make_plan
from kit.models.source import ModelShape
from kit.utils.hardware import Card

__all__ = ["Card", "MemoryPlan", "ModelShape", "Phase", "make_plan"]
