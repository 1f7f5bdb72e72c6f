"""The commands of `kit`, one module each or a few; `kit.cli` puts them together."""
