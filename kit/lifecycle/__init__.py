"""How a session starts, is found again, loops, steps, is locked, recorded and ends.

start.py       start, close, what a running session is made of
acquire.py     a stack for it: a warm one, or a new one where there is room
attach.py      an existing session whose kernel is gone; the list of sessions
journal.py     what a session is, noted at each step, so that it can be attached
lock.py        one verb at a time
step.py        one step's bookkeeping, and the sync at its end
debug.py       what stands behind a session, for tests
train_loop.py  `train`: the loop, live or in a thread
resume.py      a batch run that was killed, continued
"""
