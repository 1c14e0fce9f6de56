"""A command whose file is imported when it is called: others need not wait a second for the planner's libraries."""

import importlib
from typing import Any

import click


class LazyCommand(click.Command):
    """Stands for ``attribute`` of ``module``; ``--help`` of the group shows ``help``."""

    def __init__(self, name: str, module: str, attribute: str, help: str) -> None:
        super().__init__(name, help=help)
        self._module = module
        self._attribute = attribute

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> click.Context:
        """The real command's context, so that it is what gets invoked."""
        command: click.Command = getattr(importlib.import_module(self._module), self._attribute)
        return command.make_context(info_name, args, *more, **extra)
