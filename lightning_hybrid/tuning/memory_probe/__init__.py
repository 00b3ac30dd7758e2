"""Measures the memory of a training step on each rank alone, to find the largest microbatch that fits."""
