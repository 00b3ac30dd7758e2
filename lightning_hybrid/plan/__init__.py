"""From what a model is to a plan: which stages, which schedule. Plain Python."""
