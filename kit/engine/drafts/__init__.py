"""What drafts need on a GPU.

    drawing.py   a token for each node of what was drafted, and its log-prob, in one reading
"""
