"""Runs that fail on purpose: every rank ends, in time, and the cause is shown once."""
