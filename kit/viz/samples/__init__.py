"""Samples as pictures: rollouts, batches, token strips, before and after, the browser."""
