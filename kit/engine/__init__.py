"""SGLang as a Ray actor.

actor.py         the actor: generate, abort, sleep and wake; owns a `WeightReceiver`
server_args.py   settings of an engine, and as arguments of SGLang; the request of a generation
sampling.py      a token of each request, by its own seed and its place
routing.py       which experts each token of a request took, as SGLang reports it
quantization.py  linear layers with weights in FP8 or INT4
adapters.py      adapters of SGLang's own, beside the weights
drafts/          speculative decoding
scoring.py       log-probs of given responses, computed again
patches.py       what the kit changes in SGLang's processes, and what it relies on there
shared_router.py the choice of experts with `kit.operators`, on CPUs and GPUs alike
models/          models that SGLang lacks
families/        what is changed in SGLang for some families of models
cpu/             SGLang without a GPU
gpu/             SGLang with one
"""
