"""Heads that draft: small networks which read a policy's hidden states.

eagle.py    EAGLE heads of one layer, as the trainer computes them; one made from nothing
files.py    their directories, looked at without torch
"""
