"""``python -m aisp_local`` is the command ``aisp-local``."""

from aisp_local.cli.start import main

main()
