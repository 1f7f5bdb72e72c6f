"""A session's state on disk and back.

state.py        `TrainState`: what a session is, apart from its weights
inputs.py       what was passed to `start` as objects, named, so that it is asked for again
checkpoint.py   save and load: weights, optimizer, data order, counters, randomness
manifest.py     the sealed list of a checkpoint's files, with their sizes and hashes
values.py       what its numbers have to be, before anything of them is used
snapshots.py    states kept in host memory or in files while a session runs
export.py       the policy as a Hugging Face model directory
nanochat.py     a model directory made of a checkpoint of nanochat, with `nanochat_versions.py`
                for what its versions hold and `nanochat_tokenizer.py` for its tokenizer
quantize.py     such a directory with linear layers in FP8 or INT4
"""
