"""Applies a plan to a module and takes it off again."""
