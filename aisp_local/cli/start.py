"""Where the command begins: Ctrl-C while its modules are still being loaded is an interrupt like any other."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from aisp_local.cli.main import main as command
    except KeyboardInterrupt:
        print("aisp-local: interrupted", file=sys.stderr)
        sys.exit(130)
    command()
