"""SGLang without a GPU.

SGLang imports `sgl_kernel`, whose binary needs a GPU driver, and much of it is written for a GPU.
This folder makes the same SGLang run on a plain CPU; `kit.cluster.fork_server` makes it start fast.

    site/sgl_kernel/   stands in front of the real `sgl_kernel` on the stack's PYTHONPATH
    attention.py       an attention backend that serves the whole batch in one call per layer
    operators.py       norm, rotation, checksums, the record of experts, the KV cache's memory
    shared.py          the operators of `kit.operators`, for `training.true_on_policy`
    gated_delta.py     layers of linear attention
    speculative.py     drafts: their attention
"""
