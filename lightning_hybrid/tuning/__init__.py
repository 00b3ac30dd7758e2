"""Changes batch sizes, token budgets and shares of work during training; contains the memory probe."""
