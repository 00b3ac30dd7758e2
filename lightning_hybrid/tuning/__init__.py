"""Batch sizes, token budgets and shares of work that change during training, and the memory probe."""
