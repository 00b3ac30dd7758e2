"""`verify --config FILE --layout LAYOUT`: compares training steps in layouts with those of one process."""

from __future__ import annotations

import sys

from lightning_hybrid.cli import checkpoints
from lightning_hybrid.cli.errors import ArgumentParser, UsageError, did_you_mean
from lightning_hybrid.spec.layout import Layout

_TRAINER_OPTIONS = ("accelerator", "precision", "accumulate_grad_batches", "gradient_clip_val")
"""Options of the Trainer in the configuration that the comparison uses."""


def run(name: str, args: list[str]) -> int | None:
    """Runs `verify --config FILE [--layout LAYOUT ...] [--steps N]`; other arguments override the configuration."""
    if args and not any(arg.startswith("-") for arg in args):
        sys.stderr.write("note: `verify CHECKPOINT` is called `check CHECKPOINT` now.\n")
        return checkpoints.check("check", args)
    parser = ArgumentParser(
        prog=f"lightning-hybrid {name}",
        description="Compares training steps in layouts with those of one process. Other arguments are those of `fit`: "
        "`--config FILE`, and options that override it, such as `--model.init_args.layers 2` for a smaller model.",
    )
    parser.add_argument("--layout", action="append", help="a layout, such as dp2-pp2; may be given several times")
    parser.add_argument("--steps", type=int, default=1, help="number of training batches")
    own, others = parser.parse_known_args(args)
    if not own.layout:
        near = next((arg for arg in others if did_you_mean(arg.partition("=")[0], ["--layout"])), None)
        got = f"Got `{near}`. Did you mean `--layout`?" if near else ""
        raise UsageError(f"`--layout` must be given at least once, such as `--layout dp2`. {got}")
    try:
        layouts = [Layout.parse(layout) for layout in own.layout]
    except ValueError as error:
        raise UsageError(str(error)) from None
    from lightning_hybrid.cli.training import make  # imports take seconds, and wrong arguments are known before
    from lightning_hybrid.compare_layouts import verify

    cli = make([*others, "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.logger=false"])
    options = {key: value for key in _TRAINER_OPTIONS if (value := cli.config["trainer"][key]) is not None}
    found = verify(cli.model, cli.datamodule, layouts, steps=own.steps, **options)
    sys.stdout.write(f"{found}\n")
    return 0 if found.passed else 1
