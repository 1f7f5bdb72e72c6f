"""The memory plan: who may hold how much of the device, worked out before anything starts.

sizes.py   bytes of each part: weights, gradients, activations, KV cache, ...
plan.py    the plan: what each phase holds, what sleeps meanwhile, what to change if it does not fit
"""

from kit.memory.plan import MemoryPlan, Phase, make_plan
from kit.models.source import ModelShape
from kit.utils.hardware import Card

__all__ = ["Card", "MemoryPlan", "ModelShape", "Phase", "make_plan"]
