"""Experiments that explain: what differs between engine and trainer, and why.

agreement.py     whether the model is computed and synced rightly, seen before training
mismatch/        the log-prob check, and one experiment for each cause
startup.py       `session.check()`: invariants of a fresh session
annotate.py      log-probs, entropy and loss of each token, as the model has them now
what_if.py       the same update under other settings, undone after each
reward_trial.py  two reward functions over the same samples
"""
