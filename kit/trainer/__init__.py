"""Training of a policy as Ray actors, one for each rank.

actor.py           `Trainer`: receives calls, owns the parts
backend.py         `TrainerBackend`: what is needed of the library that computes
fsdp.py            `FsdpBackend`: the networks under FSDP2
learner.py         `Learner`: a network with optimizer, clipping and step; `ModelFactory`
process_group.py   the group of all ranks, and how all of them stop together
scoring.py         `LogProbScorer`: log-probs, entropies and values of samples
step.py            `TrainStep`: the optimizer steps of an update
loss.py            losses and off-policy corrections
batch.py           a batch cut into optimizer steps, ranks and micro-batches
state.py           `TrainerState`: snapshots, checkpoints, counters, randomness
offload.py         device memory, and tensors in host memory
hf_export.py       weights as Hugging Face files
probes.py          `Probes`: experiments of the mismatch check, token annotations
startup_check.py   what `session.check()` needs of the trainer
settings.py        `TrainerSettings`
"""
