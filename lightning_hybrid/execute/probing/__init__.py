"""How much memory a step takes, found by one rank alone."""
