"""Operators that give a row of the batch the same bits, whatever else is in the batch.

Engine and trainer compute with the very same ones where `training.true_on_policy` asks for it, so
that the log-probs of both are equal to the bit. A matrix product of a library chooses its order of
summation by the number of rows, and attention by the lengths beside it; these do not.

    adapter.py          an adapter's share of a linear layer
    cpu.py              the operators in torch, each with its gradient
    cuda.py             the operators on a GPU, each with its gradient
    cuda_attention.py   attention on a GPU
    cuda_experts.py     mixtures of experts on a GPU
    fp8_cuda.py         products of FP8 on a GPU
    fp8_linear.py       the same with a gradient
    fp8_kernels.py      their kernels
    kernels.py          their kernels, in Triton
    low_precision.py    FP8 and INT4: quantised, read, and trained through
    nf4.py              frozen weights in 4 bits, read and multiplied with
    scores.py           attention with soft caps and sinks, without a kernel
    rope.py             the table of angles, made from the model's configuration
    unknown.py          the error for a model of which something has none
    ladder.py           digests of every part's output, to find the first that differs

Every operator computes in float32 inside and rounds once to the dtype of its input.
"""
