"""SGLang's cache of prefixes gives its memory back when it is emptied.

It is a tree whose nodes know their parents and their children, each with the places of its tokens
as a tensor on the device. Where the whole tree is dropped, as after each sync, its nodes still hold
each other until Python looks for such circles, which it does ever more seldom: 1.3 MiB more of the
card's memory a step were in use where 256 responses of 1,000 tokens were written (SGLang 0.5.16).
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """From now on a tree that is dropped is taken apart at once."""
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
