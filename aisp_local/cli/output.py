"""Standard output, whatever its encoding and its state."""

from __future__ import annotations

import os
import sys

import click

from aisp_local.errors import InputError


def print_answer(text: str) -> None:
    """``print_text`` and the end of the line."""
    print_text(text + "\n")


def print_text(text: str) -> None:
    """Print to standard output, with "?" for what its encoding lacks, lone surrogates among it.

    Raises InputError when it is full; a closed pipe is click's to handle.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it exits
        raise InputError(f"standard output cannot be written ({error.strerror}); use -o FILE") from error
