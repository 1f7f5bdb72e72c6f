"""The maths of policy optimisation: pure functions on tensors, no I/O, no processes.

Names of tensors end in their dimensions:

    _T   tokens of the batch, packed one sample after the other
    _N   samples
    sample_T   which sample each token belongs to (0 .. N-1)
    mask_T     1 where a token is trained on
    group_N    which prompt each sample answers
"""
