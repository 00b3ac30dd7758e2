"""The `dp` and `fsdp` axes: gradient synchronization between replicas, sharded weights, DiLoCo, BatchNorm.

reducer: averages gradients over replicas in buckets (`dp`), and sums those of tied weights over stages.
reduction: kinds of all-reduce: exact, bfloat16, hierarchical.
fsdp: shards parameters with `fully_shard`.
diloco: local steps with an outer optimizer.
calls: the blocks that all replicas call alike, which `fsdp` gathers by themselves.
order: checks that replicas run the same collectives in the same order.
missing: gradients of weights that some replicas do not use.
written: compares weights that a step writes.
gather: `self.all_gather`, over the replicas.
batch_norm: batch statistics over all replicas.
gradient_hooks: moves the user's gradient hooks to replaced parameters.
"""
