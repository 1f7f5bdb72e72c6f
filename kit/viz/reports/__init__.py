"""Reports as pictures: updates, steps, checks, memory, settings, runs."""
