"""What is to stay on the user's and Lightning's objects after a run, by name, and why."""

from __future__ import annotations

import re

from tests.snapshot import ABSENT

LOOPS = ("fit_loop", "fit_loop.epoch_loop.val_loop", "validate_loop", "test_loop", "predict_loop")
STAYS = {
    "module._hybrid_engine": "puts the parts of the weights together again, for a next run",
    "module.__deepcopy__": "refuses a copy of parts",
    "module.load_state_dict": "gives each rank its part of whole weights",
    **{f"trainer.{loop}._combined_loader": "the loader of this rank's samples; DDP leaves one, too" for loop in LOOPS},
    "trainer.predict_loop._predictions": "every rank has those of all replicas",
    "trainer._loggers[0]._experiment.hparams['lightning_hybrid']": "the record of the run",
    "trainer._loggers[1].hparams['lightning_hybrid']": "the record of the run",
    "trainer._last_val_time": "a time of day",
    "checkpoint._last_time_checked": "a time of day",
    "callbacks[1]._average_model": "the average of this rank's parts",
    "trainer.profiler._local_rank": "as under DDP",
    "environment._world_size": "as under DDP",
    "environment._global_rank": "as under DDP",
}
"""What stays after a run under any layout, with all that is inside of it, and why."""

AFTER_A_FAILURE = {
    "process['sys.excepthook']": "the error has not reached the top yet, where one rank reports it",
    "process['threads']": "the failure monitor answers other ranks until all know the cause, and ends by itself",
    "process['atexit']": "process groups with open requests may wait for each other in their destructors",
}
"""What stays after a run that has failed, until the next run of this process begins."""

CHANGED_BATCHES = {
    "checkpoint": "saved after other steps",
    "trainer.fit_loop.epoch_loop._batches_that_stepped": "there are other steps",
    "trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress": "there are other steps",
    "trainer.fit_loop.epoch_loop.scheduler_progress": "there are other steps",
    "schedulers[0].scheduler": "there are other steps",
    "trainer.fit_loop.epoch_loop._results": "the size is logged",
    "trainer._logger_connector": "the size is logged",
    "trainer._loggers[0]._experiment.metrics_keys": "the size is logged",
}
"""What is otherwise if a callback changes the size of batches."""

WHOLE = (
    # whole weights are gathered into other parameters
    ("_parameters", "Parameter("),
    # after a failure: what refuses uses that need whole weights
    *(
        (attribute, "lightning_hybrid.parallelize.whole.Refusal")
        for attribute in (
            "_forward_pre_hooks",
            "_state_dict_pre_hooks",
            "_load_state_dict_pre_hooks",
            "__deepcopy__",
            "__reduce_ex__",
        )
    ),
)
"""What stays of a module whose weights are divided."""

PARTS = {
    "dp2": (),
    "fsdp2": (
        *WHOLE,
        ("_parameters", "DTensor("),
        # what `fully_shard` has put on, which torch cannot take off
        ("_is_fsdp_managed_module", "True"),
        ("_fsdp_use_orig_params", "True"),
        ("_forward_pre_hooks", "method torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._pre_forward"),
        ("_forward_hooks", "method torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._post_forward"),
        ("_state_dict_pre_hooks", "function torch.distributed.fsdp._fully_shard._fsdp_param_group."),
        ("_load_state_dict_pre_hooks", "function torch.distributed.fsdp._fully_shard._fsdp_param_group."),
        ("_load_state_dict_post_hooks", "function torch.distributed.fsdp._fully_shard._fsdp_param."),
        ("_forward_pre_hooks_with_kwargs", "True"),
        ("__composable_api_state_key", "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState"),
        ("__composable_api_state_key", "collections.OrderedDict"),
        # without which it would not see all calls, and the user's hooks no gradients
        ("forward", "function lightning_hybrid.replicas.fsdp._call_instead_of_forward."),
        ("_forward_pre_hooks", "function lightning_hybrid.replicas.fsdp._call_instead_of_forward."),
        ("_forward_pre_hooks", "lightning_hybrid.replicas.gradient_hooks._Gathered"),
    ),
    "tp2": (
        *WHOLE,
        ("_parameters", "DTensor("),
        # without which a module would not compute with its part of the weights
        ("_forward_pre_hooks", "function lightning_hybrid.tensor.scopes.Scopes."),
        ("_forward_hooks", "function lightning_hybrid.tensor.scopes.Scopes."),
        ("_forward_pre_hooks", "function lightning_hybrid.tensor.modules."),
        ("_forward_hooks", "function lightning_hybrid.tensor.modules."),
        ("_forward_pre_hooks", "partial method lightning_hybrid.tensor.apply.TensorParallel._note_call"),
        ("_forward_hooks", "method lightning_hybrid.tensor.apply.TensorParallel._leave_region"),
        ("_forward_pre_hooks_with_kwargs", "True"),
        ("_forward_hooks_always_called", "True"),
    ),
    "pp2": (
        *WHOLE,
        ("_parameters", ABSENT),
        ("weight", "Ghost("),
        ("bias", "Ghost("),
    ),
    "ep2": (
        *WHOLE,
        ("_parameters", "Parameter(2, "),
        ("n_experts", "2"),
        ("forward", "function lightning_hybrid.experts.parallel.DividedExperts.forward"),
    ),
}
"""What stays of the module: attributes of it or of a module inside, and how their text begins."""


def stays(layout: str, path: str, after: str, batches_change: bool, failed: bool) -> bool:
    """Whether an attribute is to be like that after a run."""
    names = [*STAYS, *(CHANGED_BATCHES if batches_change else ()), *(AFTER_A_FAILURE if failed else ())]
    if any(path == name or path.startswith((f"{name}.", f"{name}[")) for name in names):
        return True
    attribute = re.sub(r"(\[[^]]*\]|_[0-9a-f]{8}(-[0-9a-f]+)+)*$", "", path.rpartition(".")[2])
    if layout == "pp2" and path == "trainer.fit_loop.epoch_loop._results['training_step.accuracy']._forward_cache":
        return True  # the metric is another stage's
    return path.startswith("module.") and any(attribute == n and after.startswith(t) for n, t in PARTS[layout])
