"""HybridStrategy and what its hooks hand over to."""
