"""`aisp-local completion`: the script that lets a shell complete commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.output import print_text


@click.command(cls=ExamplesFirst)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes aisp-local in SHELL: commands, options, and names of models and rewards.

    \b
    Examples:
      aisp-local completion bash >> ~/.bashrc
      aisp-local completion zsh >> ~/.zshrc
      aisp-local completion fish > ~/.config/fish/completions/aisp-local.fish
    """
    made = get_completion_class(shell)
    assert made is not None  # click has all three
    script = made(context.find_root().command, {}, "aisp-local", "_AISP_LOCAL_COMPLETE").source()
    if shell == "bash":  # else a name is two words: owner/name and its tag
        script = f"COMP_WORDBREAKS=${{COMP_WORDBREAKS//:}}\n{script}"
    print_text(script)
