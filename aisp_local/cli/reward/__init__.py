"""`aisp-local reward`: tools for reward folders, one file a command."""

from __future__ import annotations

import click

from aisp_local.cli.reward.export import export


@click.group()
def reward() -> None:
    """Make reward folders."""


reward.add_command(export)
