"""Processes under a session: Ray's head, the lease, the registry, placement.

head.py          the head process: starts Ray, holds the lease, ends everything
client.py        the session's side: starts a head, connects to it
joined.py        an existing Ray cluster in place of an own head
folder.py        where the folders of stacks are made
placement.py     which devices engines and trainers take, and where they run
lease.py         the control socket: who drives a stack, and when it ends
registry.py      which stacks live on this machine; their end
processes.py     a stack's processes, found and ended; a watch over its members
progress.py      how far a start has come
fork_server.py   one process imports everything, workers are its forks (CPU)
lean_imports.py  what SGLang imports and a text model never calls, left out
worker_stub.py   what Ray starts as a worker: asks the fork server for one
"""
