"""`aisp-local reward`: rewards, and what they are worth. One file a subcommand."""

from __future__ import annotations

import click

from aisp_local.cli.help import Group
from aisp_local.cli.reward.eval import eval_
from aisp_local.cli.reward.export import export
from aisp_local.cli.reward.list import list_
from aisp_local.cli.reward.score import score
from aisp_local.cli.reward.show import show
from aisp_local.cli.reward.train import train
from aisp_local.cli.reward.verify import verify


@click.group(cls=Group)
def reward() -> None:
    """Make, list, check and measure reward models.

    \b
    Examples:
      aisp-local reward list
      aisp-local reward score judge -p "Tell me a story." "Once upon a time."
    """


reward.add_command(eval_)
reward.add_command(export)
reward.add_command(list_)
reward.add_command(score)
reward.add_command(show)
reward.add_command(train)
reward.add_command(verify)
