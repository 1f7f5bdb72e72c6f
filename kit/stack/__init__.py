"""Engines and trainers of a session, as plain method calls; the only room that holds actor handles.

stack.py      `Stack` owns the parts below, and makes them ready for each call
actors.py     the settings of each actor, and how Ray makes it
engines.py    the engines' actors, and the stream of what they write
trainers.py   the ranks' actors, and calls that all ranks answer together
offload.py    what is on the device, and what has to leave it
slots.py      what several sessions on a stack have of their own, and whose turn it is
sending.py    what a sync sends, and what of it the engines have
recovery.py   a stack that lives is taken over; dead engines are started again
calls.py      waiting for answers, with a look at who still lives
"""
