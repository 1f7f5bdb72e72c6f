"""Prompts to scored samples to the batch of an update.

template_check.py   a model's chat template, tried under limits before it is used
template_worker.py  the process in which it is tried
sampler.py     prompts rendered, requests made, responses written into samples
drafts.py      the model that drafts, found, and refused where it cannot
response.py    response tokens to the text that rewards see
collector.py   generate and score at once, filters, groups carried over to the next step
batch.py       advantages, and the batch as the trainers take it
evaluate.py    held-out mean reward, accuracy and pass@k
replay.py      saved samples in place of generation
"""
