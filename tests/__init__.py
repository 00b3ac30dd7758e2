"""Tests, in tiers: unit, distributed, gpu, recipes, benchmarks."""
