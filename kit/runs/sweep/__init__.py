"""A notebook run with many values: plan, members, state, display.

plan.py      which values, and on which devices
run.py       run and resume a sweep
member.py    one member: a run in a process of its own
state.py     how far a sweep has come; rules that stop members early
display.py   the table shown while it runs
"""
