"""Speculative decoding: drafts, and which of them become a response.

    settings.py       how an engine drafts, and what SGLang is told of it; a draft's weights
    scheduler.py      what is changed in SGLang's scheduler
    verification.py   which drafted tokens are accepted
    passes.py         what each pass of a response accepted
    choice.py         whether it drafts, by what passes take and give
    ngram.py          drafts without a model

What they attend to is in `kit.engine.cpu.speculative` and `kit.engine.gpu.speculative`.
"""
