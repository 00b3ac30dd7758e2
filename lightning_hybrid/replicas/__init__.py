"""The `dp` and `fsdp` axes: gradient synchronization between replicas, sharded weights, DiLoCo, BatchNorm.

reducer: averages gradients over replicas in buckets (`dp`), and sums those of tied weights over stages.
reduction: kinds of all-reduce: exact, bfloat16, hierarchical.
fsdp: shards parameters with `fully_shard`.
diloco: local steps with an outer optimizer.
batch_norm: batch statistics over all replicas.
gradient_hooks: moves the user's gradient hooks to replaced parameters.
"""
