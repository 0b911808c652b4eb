"""The same answers without the patch: stock releases of llama-cpp-python against the installed, patched one.

    python benchmarks/stock_releases.py [0.3.30 0.3.36] [--keep FOLDER]

For each release: a virtual environment of its own, the stock release built into it by pip (some minutes; needs a
package index), this project beside it, and one `aisp-local generate --json` there and here. Printed: whether every
candidate is the same to the last word and reward, and what standard error said. Exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [
    "-c",
    "from aisp_local.cli.main import main; main()",
    "generate",
    "Tell me a story about a fox.",
    "--json",
    "--kl",
]
COMMAND += ["--budget", "16", "--rows", "8", "--max-tokens", "48"]


def generate(python: str | Path) -> tuple[list[Any], str]:
    """What decides of every candidate, and standard error."""
    done = subprocess.run([str(python), *COMMAND], capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise SystemExit(f"{python} failed: {done.stderr}")
    candidates = json.loads(done.stdout)["candidates"]
    return [(c["iteration"], c["row"], c["text"], c["reward"], c["kl"]) for c in candidates], done.stderr.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=["0.3.30", "0.3.36"], metavar="RELEASE")
    parser.add_argument("--keep", type=Path, help="make the environments here and keep them")
    options = parser.parse_args()
    here, _ = generate(sys.executable)
    print("| stock release | candidates | the same | standard error |\n|---|---|---|---|")
    equal = True
    for release in options.releases:
        with tempfile.TemporaryDirectory(prefix="aisp-stock-") as scratch:
            folder = (options.keep or Path(scratch)) / release
            python = folder / "bin" / "python"
            if not python.exists():
                venv.create(folder, with_pip=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, f"llama-cpp-python=={release}", str(ROOT)], check=True)
            there, said = generate(python)
            same = there == here
            equal &= same
            print(f"| {release} | {len(there)} | {'yes' if same else 'no'} | {said} |", flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
