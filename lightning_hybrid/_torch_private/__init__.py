"""Every private PyTorch API that this package uses, one file per subject. Checked with torch 2.13 on the CPU."""

from lightning_hybrid._torch_private.autograd import (
    after_this_backward,
    checkpoints_not_reentrant,
    gradients_taken_by,
    in_backward,
    is_view,
    recomputation_off,
)
from lightning_hybrid._torch_private.collectives import (
    boxed_group,
    coalescing_off,
    completed_work,
    default_group,
    group_named,
    limit_waiting,
    store_client,
)
from lightning_hybrid._torch_private.dispatch import (
    DispatchMode,
    disable_torch_function,
    foreach_copy,
    make_wrapper,
    norms_of,
    run_on_meta,
    storage_resizes_seen,
    wrap_others,
)
from lightning_hybrid._torch_private.frames import main_thread_location, user_location
from lightning_hybrid._torch_private.fsdp import (
    ReduceScatter,
    finish_sharded_backward,
    forget_fully_shard,
    forget_sharded_step,
)
from lightning_hybrid._torch_private.modules import hook_tables, intercept_calls, intercepted_call
from lightning_hybrid._torch_private.optimizers import agree_on_overflow, step_without_hooks

__all__ = [
    "DispatchMode",
    "ReduceScatter",
    "after_this_backward",
    "agree_on_overflow",
    "boxed_group",
    "checkpoints_not_reentrant",
    "coalescing_off",
    "completed_work",
    "default_group",
    "disable_torch_function",
    "finish_sharded_backward",
    "foreach_copy",
    "forget_fully_shard",
    "forget_sharded_step",
    "gradients_taken_by",
    "group_named",
    "hook_tables",
    "in_backward",
    "intercept_calls",
    "intercepted_call",
    "is_view",
    "limit_waiting",
    "main_thread_location",
    "make_wrapper",
    "norms_of",
    "recomputation_off",
    "run_on_meta",
    "step_without_hooks",
    "storage_resizes_seen",
    "store_client",
    "user_location",
    "wrap_others",
]
