"""Verified, sharded checkpoints that any layout can load."""
