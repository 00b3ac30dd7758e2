"""Tensors without storage: the dry run of a step, its trace, and modules built before their weights exist.

ghost: the tensor without storage.
parameters: replaces parameters that other ranks hold by ghosts.
deferred_init: records the initialization of a module on ghosts, and replays it for single parameters.
units: finds the blocks of a module and intercepts their calls.
trace: records the data flow of a step on ghosts.
dry_run: runs a step on ghosts.
hook_use: which weights hooks write, and from which others.
learn: learns which state a step changes.
written: real tensors that a dry run writes.
record: the record of a dry run.
use: records how a step uses weights and results of units.
manual: optimizers that do nothing, for a dry run of manual optimization.
preserve: restores module state after a dry run.
objects: copies of Python objects, and differences between two copies.
state: the state of the user's code in a module.
contract: which state a step changes.
trees: tensors in nested arguments.
"""
