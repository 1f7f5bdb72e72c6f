"""What changes while it is shown: the dashboard of a training, lines of progress."""

from kit.viz.live import dashboard

__all__ = ["dashboard"]
