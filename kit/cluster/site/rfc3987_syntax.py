"""Not there for a stack's processes: making its grammar takes each of them a second of a core.

Ray imports it through jsonschema, which does without it, to check forms of addresses that Ray's own
settings do not have.
"""

raise ImportError("left out of the kit's processes")
