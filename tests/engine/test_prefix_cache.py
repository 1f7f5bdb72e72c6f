"""SGLang's cache of prefixes, when it is emptied."""

import gc
import pickle
import weakref
from array import array

import pytest
import torch

from kit.config import EngineConfig
from kit.engine import patches
from kit.engine.server_args import EngineSettings

pytestmark = pytest.mark.in_sglang


def test_an_emptied_cache_of_prefixes_holds_no_memory_until_python_looks_for_circles() -> None:
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    def key(*tokens: int) -> RadixKey:
        return RadixKey(token_ids=array("q", tokens))

    patches.register_prefix_cache()
    patches.register_prefix_cache()  # a second time changes nothing
    tree = RadixCache.create_simulated()
    for tokens in ([1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 5, 6], [8, 9]):
        tree.insert(InsertParams(key=key(*tokens), value=torch.tensor(tokens)))
    nodes, found = [tree.root_node], []
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        found += [weakref.ref(node), *([weakref.ref(node.value)] if len(node.value) else [])]
    del node
    assert len(found) == 11
    gc.disable()
    try:
        tree.reset()
        assert [held() for held in found if held() is not None] == []
    finally:
        gc.enable()
    tree.insert(InsertParams(key=key(1, 2, 3), value=torch.tensor([7, 8, 9])))
    match = tree.match_prefix(MatchPrefixParams(key=key(1, 2, 4)))
    assert match.device_indices.tolist() == [7, 8]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_scheduler_process_is_told_by_name_what_to_run(device: str) -> None:
    """SGLang starts it as a new interpreter beside a GPU, which gets what it runs pickled."""
    settings = EngineSettings(EngineConfig(), "model", device, "float32", 512, 64, 0, threads=2)
    run = object.__new__(patches.engine_class(settings)).run_scheduler_process_func
    told = pickle.loads(pickle.dumps(run))
    if device == "cuda":
        assert (told.func, told.args) == (patches.run_on_gpu, (None, "model", False, None, None))
    else:
        assert (told.func, told.args) == (
            patches.run_on_cpu,
            (2, None, "model", False, None, None),
        )
