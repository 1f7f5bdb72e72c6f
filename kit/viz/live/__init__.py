"""Displays that change while they are shown: dashboard, progress lines."""

from kit.viz.live import dashboard

__all__ = ["dashboard"]
