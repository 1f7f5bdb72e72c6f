"""Heads that draft: small networks which read a policy's hidden states.

head.py           what all of them are: what they read of a policy, and what their log-probs are
eagle.py          EAGLE heads of one layer, as the trainer computes them
eagle3.py         EAGLE-3 heads, likewise
mtp.py            the layer of a model's own that predicts a further token
making.py         heads that have learned nothing yet
files.py          directories of EAGLE heads, looked at without torch
eagle3_files.py   those of EAGLE-3 heads
mtp_files.py      layers that predict a further token in the files of models
"""
