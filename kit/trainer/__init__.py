"""The learner as a Ray actor, one for each rank: FSDP2.

actor.py           Trainer: takes calls, owns the parts
step.py            the optimizer step over micro-batches
loss.py            policy loss and off-policy corrections of a micro-batch
batch.py           an update's batch split over steps, ranks and micro-batches
scoring.py         log-probs, with and without gradient
learner.py         models made, placed and warmed up; the critic
state.py           tensors by name, snapshots, checkpoints, randomness
offload.py         device memory, and the trainer's sleep in host memory
fsdp.py            FSDP2: sharding, gathering, gradient clipping
process_group.py   torch.distributed between the ranks, and with engines
hf_export.py       weights as Hugging Face files
probes.py          experiments of the mismatch check; token annotations
startup_check.py   the invariants of `session.check()` that need the trainer
settings.py        what a trainer is started with
"""
