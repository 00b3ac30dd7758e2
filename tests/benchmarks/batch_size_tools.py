"""One rank of one search for a batch size, by one tool; a process of its own, started by `batch_size_finders`.

Every tool trains the same network in the way its documentation shows, under an injected limit of samples: beyond it the
network runs out of memory half-way through its forward pass. What happens is appended to a file for each rank, line by
line, so that a rank that hangs has still said how far it came. Only the tool that is asked for is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.benchmarks.batch_size_probe import JOB, READY, SEED, STEPS, Job, Log, Network, Probe, adam, layers, samples

# ---- this package


def ours(job: Job, probe: Probe) -> None:
    """`AdaptiveBatchSize(memory=...)`: a loader's batch of the largest size, run in microbatches that fit."""
    L = importlib.import_module("lightning.pytorch")
    package = importlib.import_module("lightning_hybrid")
    callbacks = importlib.import_module("lightning_hybrid.callbacks")

    probe.log(READY)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network(probe)

        def on_fit_start(self) -> None:
            probe.dry = False

        def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
            probe.allocate(len(batch[0]))  # on every stage of a pipeline
            return nn.functional.mse_loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self)

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            probe.found(job.size or adaptive.division.microbatch_size)
            probe.searching, probe.optimizer = False, trainer.optimizers[0]

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step:
                probe.step_ends(module.network)

    probe.searching, probe.dry = job.size is None, True
    L.seed_everything(SEED)
    adaptive = callbacks.AdaptiveBatchSize(memory="device", statistics=None)
    batch = job.size or job.maximum
    trainer = L.Trainer(
        accelerator="cpu",
        devices=len(job.limits),
        strategy=package.HybridStrategy(
            layout={"one": "dp1", "ddp": "dp2", "fsdp2": "fsdp2", "pipeline": "pp2"}[job.layout]
        ),
        accumulate_grad_batches=job.maximum // batch,
        callbacks=[Watch()] if job.size else [adaptive, Watch()],
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(samples(), batch, shuffle=True))


# ---- Lightning


def lightning_power(job: Job, probe: Probe) -> None:
    """`BatchSizeFinder` as it is by default."""
    _lightning(job, probe, "power")


def lightning_binsearch(job: Job, probe: Probe) -> None:
    """`BatchSizeFinder(mode="binsearch")`."""
    _lightning(job, probe, "binsearch")


def _lightning(job: Job, probe: Probe, mode: str) -> None:
    L = importlib.import_module("lightning.pytorch")
    strategies = importlib.import_module("lightning.pytorch.strategies")

    probe.log(READY)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = job.size or 1
            self.network = Network(probe)

        def configure_model(self) -> None:
            if job.layout == "fsdp2":
                _shard(self.network, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
            return nn.functional.mse_loss(self.network(batch[0]), batch[1])

        def train_dataloader(self) -> DataLoader:
            return DataLoader(samples(), self.batch_size, shuffle=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self)

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            probe.found(module.batch_size)
            probe.searching, probe.optimizer = False, trainer.optimizers[0]

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            probe.step_ends(module.network)

    probe.searching = job.size is None
    L.seed_everything(SEED)
    finder = L.callbacks.BatchSizeFinder(mode=mode, max_val=job.maximum)
    sharded = strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=len(job.limits),
        strategy={"one": "auto", "ddp": "ddp", "fsdp2": sharded}[job.layout],
        callbacks=[Watch()] if job.size else [finder, Watch()],
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=job.folder,
    )
    trainer.fit(Module())


# ---- accelerate


def accelerate(job: Job, probe: Probe) -> None:
    """As in its example `by_feature/memory.py`: everything, the seed too, inside the decorated function.

    It silently ignores its FSDP plugin on a CPU, so the network is wrapped by hand; the decorator knows nothing of it.
    """
    package = importlib.import_module("accelerate")
    utils = importlib.import_module("accelerate.utils")
    probe.log(READY)
    accelerator = package.Accelerator(cpu=True)

    @utils.find_executable_batch_size(starting_batch_size=job.size or job.maximum)
    def train(batch_size: int) -> int:
        accelerator.free_memory()
        utils.set_seed(SEED)
        network = Network(probe)
        if job.layout == "fsdp2":
            _shard(network)
        optimizer, batches = accelerator.prepare(adam(network), DataLoader(samples(), batch_size, shuffle=True))
        model = network if job.layout == "fsdp2" else accelerator.prepare(network)
        probe.optimizer = optimizer.optimizer
        for _, (x, y) in zip(range(STEPS), batches, strict=False):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            probe.step_ends(network)
        return batch_size

    probe.found(train())


def _shard(network: nn.Module, **options: Any) -> None:
    fsdp = importlib.import_module("torch.distributed.fsdp")
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            fsdp.fully_shard(layer, **options)
    fsdp.fully_shard(network, **options)


# ---- Composer


def composer(job: Job, probe: Probe) -> None:
    """`device_train_microbatch_size="auto"`; its check for a GPU is met by a device of both classes."""
    if torch.version.cuda is None:  # torchvision's operators do not load there; Composer wants its image transforms
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    package = importlib.import_module("composer")
    devices = importlib.import_module("composer.devices")
    dist = importlib.import_module("composer.utils.dist")
    parallelism = importlib.import_module("composer.utils.parallelism")

    probe.log(READY)

    class Device(devices.DeviceCPU, devices.DeviceGPU):
        def __init__(self) -> None:
            self._device = torch.device("cpu")

    class Model(package.models.ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network(probe)

        def forward(self, batch: Sequence[Tensor]) -> Tensor:
            return self.network(batch[0])

        def loss(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
            return nn.functional.mse_loss(outputs, batch[1])

    class Watch(package.core.Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            probe.step_ends(model.network)

    torch.manual_seed(SEED)
    model, device, ranks = Model(), Device(), len(job.limits)
    if ranks > 1:
        dist.initialize_dist(device)
    probe.optimizer = adam(model)
    data = samples()
    sampler = dist.get_sampler(data, shuffle=True) if ranks > 1 else None
    config = {"fsdp2": {"fsdp2": parallelism.FSDP2Config()}, "sharded": {"fsdp": parallelism.FSDPConfig()}}
    trainer = package.Trainer(
        model=model,
        train_dataloader=DataLoader(data, job.maximum, shuffle=sampler is None, sampler=sampler),
        optimizers=probe.optimizer,
        max_duration=f"{STEPS}ba",
        device=device,
        precision="fp32",
        device_train_microbatch_size=job.size or "auto",
        parallelism_config=parallelism.ParallelismConfig(**config[job.layout]) if job.layout in config else None,
        callbacks=[Watch()],
        progress_bar=False,
        seed=SEED,
    )
    trainer.fit()
    probe.found(trainer.state.device_train_microbatch_size)


# ---- DeepSpeed


def deepspeed_launch(job: Job, logs: Sequence[Log]) -> None:
    """Its autotuner starts this file anew for each size it tries; then comes a training with what it found."""
    folder = Path(job.folder)
    config = {
        "train_micro_batch_size_per_gpu": job.size or "auto",
        "gradient_accumulation_steps": 2 if job.layout == "pipeline" else 1,
        "zero_optimization": {"stage": 3 if job.layout == "sharded" else 0},
    }
    tuning = {
        "enabled": True,
        "fast": True,
        "mp_size": 2 if job.layout == "pipeline" else 1,
        "max_train_micro_batch_size_per_gpu": job.maximum,
        "results_dir": str(folder / "results"),
        "exps_dir": str(folder / "experiments"),
    }
    file = folder / "config.json"
    if job.size is None:
        file.write_text(json.dumps({**config, "autotuning": tuning}))
        _deepspeed_runs(job, file, "--autotuning", "tune")
        best = folder / "results" / "ds_config_optimal.json"
        if not best.exists():
            raise RuntimeError(f"no configuration found; last trial: {logs[0].last_error()}")
        config["train_micro_batch_size_per_gpu"] = json.loads(best.read_text())["train_micro_batch_size_per_gpu"]
        for log in logs:
            log("found", size=config["train_micro_batch_size_per_gpu"])
    file.write_text(json.dumps(config))
    _deepspeed_runs(job, file)


def _deepspeed_runs(job: Job, file: Path, *options: str) -> None:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *options]
    launcher += ["--num_gpus", str(len(job.limits)), "--master_port", os.environ["MASTER_PORT"]]
    script = [__file__, "--deepspeed", "--deepspeed_config", str(file)]
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    device = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(len(job.limits)), "PATH": binaries}
    subprocess.run([*launcher, *script], check=False, env={**os.environ, **device}, cwd=job.folder)


def deepspeed(job: Job, probe: Probe) -> None:
    """One rank of one of the launches."""
    package = importlib.import_module("deepspeed")
    probe.log(READY)
    arguments = importlib.import_module("argparse").ArgumentParser()
    arguments.add_argument("--local_rank", type=int)
    options = package.add_config_arguments(arguments).parse_args()
    torch.manual_seed(SEED)
    if job.layout == "pipeline":
        package.init_distributed("gloo")
        pipe = importlib.import_module("deepspeed.pipe")
        model: nn.Module = pipe.PipelineModule(layers(probe), num_stages=2, loss_fn=nn.functional.mse_loss)
    else:
        model = Network(probe)
    probe.optimizer = adam(model)
    engine, *_ = package.initialize(args=options, model=model, optimizer=probe.optimizer)
    size, ranks, rank = engine.train_micro_batch_size_per_gpu(), len(job.limits), int(os.environ["RANK"])
    batches = _shares(size, 0, 1) if job.layout == "pipeline" else _shares(size, rank, ranks)
    for _ in range(STEPS * (1 if job.layout == "pipeline" else engine.gradient_accumulation_steps())):
        if job.layout == "pipeline":
            engine.train_batch(batches)
            continue
        x, y = next(batches)
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()
        probe.step_ends(model)


def _shares(size: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for x, y in DataLoader(samples(), size * ranks, shuffle=True, drop_last=True):
            yield x[rank::ranks], y[rank::ranks]


# ---- a process

TOOLS: dict[str, Callable[[Job, Probe], None]] = {
    function.__name__: function
    for function in (ours, lightning_power, lightning_binsearch, accelerate, composer, deepspeed)
}


def main() -> None:
    """Runs the job in the environment; its errors go to the rank's file."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    job = Job(**json.loads(os.environ[JOB]))
    rank = int(os.environ.get("RANK", "0"))
    logs = [Log(job.folder, r) for r in range(len(job.limits))]
    try:
        if job.tool == "deepspeed" and "RANK" not in os.environ:
            deepspeed_launch(job, logs)
            return
        TOOLS[job.tool](job, Probe(job, rank))
    except Exception as error:
        logs[rank]("error", kind=type(error).__name__, text=str(error))
        raise
    logs[rank]("done")


if __name__ == "__main__":
    main()
