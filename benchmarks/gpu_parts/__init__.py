"""The parts of `python -m benchmarks.gpu`.

workload.py   what is run: the model's shape, prompts, lengths, how often
floors.py     what bytes and operations cost at least, at a card's rates
results.py    what was measured, in a file that is written as soon as anything is known
children.py   processes of their own for parts, so that one's failure is not another's
card.py       the card's own rates, and the model directory
engine.py     SGLang alone: the reference of the session's engine
session.py    everything that one running session is asked
training.py   the trainer without an engine: micro-batches and recomputation
trl.py        the same iteration in TRL
cards.py      sessions of their own: a small card, learning, memory run out on purpose
predictable.py  a model trained on text that drafts can guess, and an EAGLE head for it
comparison.py  responses with drafts beside those without, and the rows of that
rows.py       measured numbers beside reference, bound and target
page.py       the table in the terminal, and docs/performance.md
fp8_products.py  bits and times of FP8 products, for `python -m benchmarks.low_precision`
step_profile.py  where a decoding step's time goes, by kernel
update_profile.py  where an update's time goes, by kernel

Nothing here imports torch before a child process runs a part.
"""
