"""Checkpoints of a partitioned module and its optimizers."""
