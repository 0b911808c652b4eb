"""Launcher for a checkout: python cli.py chat"""

from aisp_local.cli.start import main

if __name__ == "__main__":
    main()
