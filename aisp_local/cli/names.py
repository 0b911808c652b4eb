"""Paths and names of models and rewards on the command line: what they stand for, and their completion in a shell."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from aisp_local.errors import ModelError


class FilePath(click.Path):
    """A file or a folder. Nothing at all, as of a variable of the shell that is not set, is none: not this folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return Path(os.fsdecode(super().convert(value, param, ctx)))


class ModelPath(FilePath):
    """A GGUF file, by its path or by the name of a model on this machine."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from aisp_local.models import find_model

        try:
            return find_model(super().convert(value, param, ctx))
        except ModelError as error:
            if ctx is not None and param is not None and ctx.lookup_default(str(param.name), call=False) == value:
                raise ModelError(f"{error} (aisp-local config show says where it is set)") from error
            raise

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return complete_model(ctx, param, incomplete)


class RewardPath(FilePath):
    """A reward folder or a TOML file; what is none may be a name, which the library knows."""

    name = "reward"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return super().convert(value, param, ctx).expanduser()  # no shell reads the settings

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from aisp_local import plugins, shipped
        from aisp_local.reward_kit.folders import find_rewards, standard_folders

        folders = find_rewards(standard_folders()[1:])
        return _matching(incomplete, ["shipped", "judge", *shipped.recipes(), *plugins.rewards(), *map(str, folders)])


FILE = FilePath()
MODEL = ModelPath()
REWARD = RewardPath()


Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completing(names: Callable[[], Sequence[str]]) -> Complete:
    """Completion of an option or argument that takes one of these names, which are asked for only then, or a file."""
    return lambda _context, _parameter, incomplete: _matching(incomplete, names())


def complete_model(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names that begin so, else files."""
    from aisp_local.models import all_models

    return _matching(incomplete, [model.name for model in all_models()])


def _matching(incomplete: str, names: Sequence[str]) -> list[CompletionItem]:
    found = [CompletionItem(name) for name in names if name.lower().startswith(incomplete.lower())]
    return found or [CompletionItem(incomplete, type="file")]
