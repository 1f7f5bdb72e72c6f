"""SGLang without a GPU.

SGLang imports `sgl_kernel`, whose binary needs a GPU driver, and forks nothing of what it imports.
This folder makes the same SGLang run, and start fast, on a plain CPU:

    site/sgl_kernel/   stands in front of the real `sgl_kernel` on the stack's PYTHONPATH
    attention.py       an attention backend that serves the whole batch in one call per layer
    lean_imports.py    leaves out what SGLang imports but a text model on a CPU never calls
    zygote.py          one process imports everything once; workers and schedulers are its forks
"""
