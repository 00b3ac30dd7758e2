"""Decisions as pure functions of measurements: batch sizes, phases, rebalancing. No torch."""
