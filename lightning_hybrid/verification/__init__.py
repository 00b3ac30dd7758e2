"""Compares a training step under the layout with the same step of one process, before the first update."""
