"""Weights from trainer to engine: gather, transform, transport, receive.

coordinator.py   one sync, as the session's process drives it
sender.py        the trainer's side: parameters gathered whole, bucket by bucket
transform.py     what is done to a weight on its way (noise, rounding)
transport.py     buckets: CUDA IPC, shared memory
"""
