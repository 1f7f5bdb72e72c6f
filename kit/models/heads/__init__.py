"""Heads that draft: small networks which read a policy's hidden states.

head.py        what all of them are: what they read of a policy, and what their log-probs are
eagle.py       EAGLE heads of one layer, as the trainer computes them; one made from nothing
mtp.py         the layer of a model's own that predicts a further token
files.py       directories of EAGLE heads, looked at without torch
mtp_files.py   such layers in the files of models, likewise
"""
