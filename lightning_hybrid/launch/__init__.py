"""Starts the processes of a run, connects them, monitors their failures, and ends them."""
