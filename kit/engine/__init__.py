"""SGLang as a Ray actor.

actor.py         the actor: generate, abort, sleep and wake; owns a `WeightReceiver`
server_args.py   settings of an engine, and as arguments of SGLang; the request of a generation
routing.py       which experts each token of a request took, as SGLang reports it
quantization.py  linear layers with weights in FP8 or INT4
adapters.py      adapters of SGLang's own, beside the weights
speculative.py   drafts: settings, weights of their own, and what is changed for them
gpu_speculative.py   attention of drafted tokens on a GPU
draft_choice.py  whether it drafts, by what passes take and give
verification.py  which drafted tokens are accepted
ngram.py         drafts without a model
scoring.py       log-probs of given responses, computed again
patches.py       what the kit changes in SGLang's processes, and what it relies on there
gpu.py           SGLang on a GPU with the operators of `kit.operators`
shared_router.py its choice of experts, on CPUs and GPUs alike, with one of them
models/          models that SGLang lacks
decode_windows.py  windows of a GPU's attention where it writes
families/        what is changed in SGLang for some families of models
cpu/             SGLang without a GPU
"""
