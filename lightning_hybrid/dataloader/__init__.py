"""Shards data over replicas: samples, their order and the RNG states under which they are read."""
