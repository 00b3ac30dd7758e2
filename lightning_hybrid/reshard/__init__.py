"""Moves weights, optimizer state and buffers from one layout to another during training."""
