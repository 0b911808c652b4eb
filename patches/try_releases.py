"""Try the series on other releases of llama-cpp-python and report.

    python patches/try_releases.py [0.3.34 0.3.35 0.3.36] [--wheels FOLDER]

For each release: download the sdist through pip, apply every patch with ``git apply``, and say which of them fit as
they are, which at other lines (then regenerate the series: README.md), and which not, and where. A patch that does
not fit is left out and the next one tried. With ``--wheels`` every release on which the whole series fits is built too.
Needs the build requirements: pip install scikit-build-core patch-ng. Exit code 1 if the series does not fit everywhere.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import backend  # noqa: E402
from aisp_build import series, source  # noqa: E402
from aisp_build.errors import BuildError  # noqa: E402

RELEASES = ("0.3.34", "0.3.35", "0.3.36")


def try_patch(path: Path, tree: Path) -> str:
    """``fits``, ``fits at other lines``, or the first place where it does not. Applied if it fits."""
    command = ["git", "apply", "--verbose", "--whitespace=nowarn", str(path)]
    said = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if said.returncode:
        wrong = re.search(r"error: patch failed: (?:vendor/llama\.cpp/)?(.+)", said.stderr)
        missing = re.search(r"error: (?:vendor/llama\.cpp/)?(.+: No such file or directory)", said.stderr)
        found = wrong or missing
        return f"no: {found[1] if found else said.stderr.strip().splitlines()[-1]}"
    return "fits at other lines" if re.search(r"\(offset -?\d+ line", said.stderr) else "fits"


def try_release(pin: source.Pin, wheels: Path | None) -> list[str]:
    """What became of each patch, and of the build."""
    with tempfile.TemporaryDirectory(prefix="aisp-releases-") as work:
        source.download(pin, work)
        tree = source.unpack(Path(work) / pin.sdist, Path(work) / "tree")
        found = [try_patch(path, tree) for path in series.patches(backend.HERE / "series")]
        if wheels is not None and not any(result.startswith("no") for result in found):
            source.set_version(tree, pin)
            wheels.mkdir(parents=True, exist_ok=True)
            try:
                found.append(backend.compile_tree(tree, wheels, {}))
            except BuildError as error:
                found.append(f"no: {error}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=RELEASES, metavar="RELEASE")
    parser.add_argument("--wheels", type=Path, help="build too, into this folder")
    options = parser.parse_args()
    missing = [name for name in ("scikit_build_core", "patch_ng") if find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} missing; pip install scikit-build-core patch-ng")
    pin = source.read_pin(backend.HERE / "pin.toml")
    names = [path.name.split("-")[0] for path in series.patches(backend.HERE / "series")]
    header = ["release", *names, *(["wheel"] if options.wheels else [])]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    failed = False
    for release in options.releases:
        try:
            found = try_release(replace(pin, version=release), options.wheels)
        except BuildError as error:
            found = [f"no: {error}"]
        failed |= any(result.startswith("no") for result in found)
        found += ["-"] * (len(header) - 1 - len(found))
        print("| " + " | ".join([release, *found]) + " |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
