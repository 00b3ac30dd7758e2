"""The layout changes while training goes on: what a rank holds moves by name, and everything around follows."""
