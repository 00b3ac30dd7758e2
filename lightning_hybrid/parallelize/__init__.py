"""From a request to a partitioned module, in one wrapping order.

plan: decides how a module is partitioned, from a dry run.
apply: applies the plan to the module, and removes it (`Partition`).
observe: the calls of units on this replica's own first batch.
optimizers: optimizers that were made before the module was partitioned.
recompute: activation checkpointing of blocks.
whole_batch: the number of microbatches, and when a pipeline must not split batches.
backward_hooks: refuses backward hooks of modules with several stages.
placement: the part of each parameter that a rank holds, and the ranks with the same part.
"""
