"""Life of a session: start, attach, train loop, step, lock, journal, end.

start.py       `SessionParts`: what a session is made of; start and close
checks.py      what settings and model are refused for, before anything starts
running.py     the session of this process, and its end for a new one
acquire.py     a stack for it: a warm one, or a new one where there is room
attach.py      an existing session whose kernel is gone; the list of sessions
journal.py     what a session is, noted at each step, so that it can be attached
lock.py        one verb at a time
load.py        a checkpoint or snapshot put back, with other settings where asked
step.py        an update, and what follows it: sync, metrics, evaluation, checkpoint
configure.py   changes of settings while a session runs
train_loop.py  `train`: the loop, live or in a thread
forks.py       further sessions on the stack of one that trains adapters
resume.py      a batch run that was killed, continued
"""
