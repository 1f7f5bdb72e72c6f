"""Helpers for every room: interrupts, files, hardware, formatting, imports, versions."""
