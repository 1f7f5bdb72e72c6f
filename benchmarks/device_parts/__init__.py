"""The parts of `python -m benchmarks.many_devices`.

rows.py       which sessions are measured, in which order, and which fit side by side
shapes.py     the models' shapes, and the directories of random weights
task.py       what a row's process is told: a file; its session's settings
children.py   a row in a process of its own, with a time limit
worker.py     what that process runs
measure.py    one session: the first update on the batch that all share, then steps of its own
faults.py     a rank killed, a checkpoint read by another number of ranks, a sweep over all devices
results.py    what is known of each row, in a file that is written whenever there is more
table.py      the arithmetic of the table, and its Markdown

The command itself loads no torch: a process that has opened a GPU would take memory of it.
"""
