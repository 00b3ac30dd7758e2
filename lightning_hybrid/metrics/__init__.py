"""Reduces logged values, torchmetrics and outputs of steps over ranks; passes the plan to loggers."""
