"""`fit`, `validate`, `test` and `predict`: LightningCLI for any model, data module and strategy, by class path."""

from __future__ import annotations

import re
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from lightning_hybrid._lightning_private.command_line import CommandLine, nested_values_kept
from lightning_hybrid.adapt.phases import Phase
from lightning_hybrid.callbacks.phase_schedule import PhaseSchedule
from lightning_hybrid.callbacks.save_config import SaveConfig
from lightning_hybrid.checkpoint.files import not_a_checkpoint
from lightning_hybrid.cli.class_paths import is_class, nearest_class
from lightning_hybrid.cli.configs import Configs
from lightning_hybrid.cli.errors import UsageError, did_you_mean
from lightning_hybrid.cli.explain import explain
from lightning_hybrid.cli.tracebacks import refusal
from lightning_hybrid.launch.terminal import LEAF_SPEC

_NOT_FILES = re.compile(r"last|best|hpc|registry.*|.*://.*")
"""Values of `--ckpt_path` that are no paths."""


def run(name: str, args: list[str]) -> None:
    """Runs a subcommand of LightningCLI."""
    _CLI(name, Configs(args), save_config_callback=SaveConfig, save_config_kwargs={"overwrite": True})


def make(args: list[str]) -> LightningCLI:
    """Returns a LightningCLI with model, data module and trainer, which runs nothing."""
    return _CLI(None, Configs(args), save_config_callback=None)


def make_data(args: list[str]) -> LightningDataModule | None:
    """Returns the data module of a configuration; makes neither its model nor its trainer."""
    return _DataCLI(None, Configs(args), save_config_callback=None).datamodule


class _CLI(CommandLine):
    """LightningCLI with an additional key `phases:`, a list of `Phase`, and errors of one paragraph.

    Args:
        name: The subcommand, whose options alone are built; None: the options without a subcommand.
        configs: The arguments, with files of configurations.
        **options: Arguments of LightningCLI.
    """

    def __init__(self, name: str | None, configs: Configs, **options: Any) -> None:
        warnings.filterwarnings("ignore", message=LEAF_SPEC, category=FutureWarning)
        self._name, self._configs = name, configs
        own_options: dict[str, Any] = {"exit_on_error": False}
        parser_options = {"prog": "lightning-hybrid"} | own_options
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=_Parser,
            parser_kwargs=parser_options | {str(name): own_options} if name else parser_options,
            args=[name, *configs.args] if name else configs.args,
            run=name is not None,
            **options,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] -- static in LightningCLI
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name == self._name}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self._options = parser
        parser.add_argument(
            "--phases", type=list[Phase] | None, default=None, help="Phases of training: see callbacks.PhaseSchedule."
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            with nested_values_kept():
                self.config = parser.parse_args(args)  # type: ignore[arg-type] -- a list
                if classes := self._class_paths():
                    self.config = parser.parse_args([*args, *classes])  # type: ignore[misc] -- a list
        except ArgumentError as error:
            options = ["--config", "--print_config", *re.findall(r"--[\w.]+", self._options.format_usage())]
            raise UsageError(explain(str(error), options, self._configs)) from None

    def _class_paths(self) -> list[str]:
        """Returns options that give the class paths of the trainer which were taken for names, since both are texts."""
        trainer = (self.config[self._name] if self._name else self.config)["trainer"]
        given = {name: trainer.get(name) for name in ("strategy", "accelerator")}
        paths = {name: text for name, text in given.items() if isinstance(text, str) and is_class(text)}
        return [f"--trainer.{name}={{class_path: {path}}}" for name, path in paths.items()]

    @override
    def before_instantiate_classes(self) -> None:
        self.parser.add_instantiator(_construct, object)  # type: ignore[arg-type] -- of any class
        _check_trainer(self._get(self.config, "trainer"))
        _check_strategy(self._get(self.config, "trainer")["strategy"])
        if self.subcommand:
            _check_checkpoint(self._get(self.config, "ckpt_path"))

    @override
    def instantiate_classes(self) -> None:
        try:
            with _constructors_seen():
                self._instantiate()
        except (Exception, _Raised) as error:
            cause = error.error if isinstance(error, _Raised) else error
            message = refusal(cause)
            if message is None:
                raise cause from None
            raise UsageError(message) from None

    def _instantiate(self) -> None:
        super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        phases = self._get(self.config_init, "phases")
        if phases:
            trainer.callbacks.append(PhaseSchedule(phases))  # type: ignore[attr-defined] -- set by a connector
        return trainer


class _DataCLI(_CLI):
    """Makes the data module only."""

    @override
    def _instantiate(self) -> None:
        self.datamodule = self.parser.instantiate(Namespace(data=self.config["data"]))["data"]


def _check_trainer(trainer: Any) -> None:
    """Checks what Lightning divides by."""
    for name in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch", "num_nodes"):
        value = trainer.get(name)
        if isinstance(value, (int, float)) and value <= 0:
            raise UsageError(f"`trainer.{name}` must be larger than 0. Got {value}.")


def _check_strategy(strategy: Any) -> None:
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy not in known:
        near = nearest_class(strategy) if "." in strategy else did_you_mean(strategy, known)
        raise UsageError(f"`trainer.strategy`: there is no strategy `{strategy}`. {near}")


def _check_checkpoint(path: Any) -> None:
    if path is None or _NOT_FILES.fullmatch(str(path)):
        return
    if Path(path).exists():
        problem = not_a_checkpoint(Path(path))
        if problem is not None:
            raise UsageError(f"`--ckpt_path`: {problem}")
        return
    folder = Path(path).parent
    names = [str(folder / file.name) for file in folder.iterdir()] if folder.is_dir() else []
    raise UsageError(f"`--ckpt_path`: there is no checkpoint {path}. {did_you_mean(str(path), names)}")


# ---- errors of constructors: jsonargparse makes a text of them, without a traceback


class _Raised(BaseException):
    """Carries an error of a constructor past jsonargparse."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


_seen: ContextVar[bool] = ContextVar("seen", default=False)


@contextmanager
def _constructors_seen() -> Iterator[None]:
    token = _seen.set(True)
    try:
        yield
    finally:
        _seen.reset(token)


def _construct(class_type: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return class_type(*args, **kwargs)


class _Parser(LightningArgumentParser):
    """LightningCLI's parser, which lets errors of constructors through, and takes no abbreviations.

    jsonargparse makes such a parser for each class in a configuration, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    @override
    def add_instantiator(self, instantiator: Callable[..., Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        @wraps(instantiator)
        def seen(*values: Any, **options: Any) -> Any:
            try:
                return instantiator(*values, **options)
            except Exception as error:
                if _seen.get():
                    raise _Raised(error) from None
                raise

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the only way that LightningCLI has
            super().add_instantiator(seen, *args, **kwargs)
