"""Empty stand-in for a package whose grammar takes a second of a core in each process.

Ray imports it through jsonschema, which does without it, to check forms of addresses that Ray's own
settings do not have.
"""

raise ImportError("left out of the kit's processes")
