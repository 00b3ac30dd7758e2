"""Captures, restores, synchronizes and seeds (per batch and unit) the random number generators."""
