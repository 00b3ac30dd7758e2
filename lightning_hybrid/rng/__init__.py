"""Random number generators: captured, restored, agreed on by all ranks, seeded per batch and unit."""
