"""What changes while it is shown: dashboard, widgets, progress."""
