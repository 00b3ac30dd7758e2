"""Runs steps of a partitioned module: forward, pipeline, backward, gradient synchronization, optimizer step."""
