"""Architectures that every layout must train as one process would, or refuse."""
