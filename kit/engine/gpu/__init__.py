"""SGLang on a GPU.

    sampling.py         a token of each request, by its own seed, in one reading of its logits
    drawing.py          the kernel that draws them
    logits.py           logits that it reads, in the dtype of the product that makes them
    shared.py           the operators of `kit.operators`, for `training.true_on_policy`
    speculative.py      drafts: their graphs and masks
    decode_attention.py the kernel with which the last token of each request attends to all before
    attention_inputs.py the kernel that makes queries, keys and values of new tokens ready for it
    draft_attention.py  the kernel with which a few new tokens of each request attend to all before
    windows.py          windows of its Triton attention where it writes

Imported on a GPU only, but for kernels that Triton's interpreter runs.
"""
