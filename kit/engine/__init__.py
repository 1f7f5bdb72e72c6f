"""SGLang as a Ray actor.

actor.py         the actor: generate, abort, sleep and wake, take weights
server_args.py   the kit's settings in SGLang's words; the request of a generation
scoring.py       log-probs of given tokens, checksums of weights
patches.py       what the kit changes in SGLang's scheduler, and why
cpu/             SGLang without a GPU
"""
