"""Kernels with which a GPU verifies drafts.

    attention.py   a few new tokens of each request attend to all before
    drawing.py     a token for each node of what was drafted, and its log-prob, in one reading

They are in Triton, and imported on a GPU only.
"""
