"""Weights from trainer to engine: gather, transform, transport, receive, verify.

coordinator.py   one sync, as the driver sees it: bucket by bucket, from all ranks to all engines
sender.py        the trainer's side: parameters gathered whole, put into buffers or broadcast
transform.py     what is done to a weight on its way: noise, rounding
transport.py     buckets and their layout; buffers in shared memory and behind CUDA IPC
receiver.py      the engine's side: pause, load, go on; which model a bucket is for
verify.py        checksums of both sides, and their comparison
"""
