"""Logged values, torchmetrics and outputs of steps, reduced over ranks; the plan as a table."""
