"""The `dp` and `fsdp` axes: gradient synchronization between replicas, sharded weights, DiLoCo, BatchNorm."""
