"""Prove the native patch: a made-up model of every architecture against a numpy oracle, and bit for bit against stock.

    python benchmarks/native_proof.py [--stock WHEEL_OR_FOLDER | --build-stock] [--only NAME ...] [--write]

With AISP_TEST_GPU_LAYERS=-1 in the environment the models lie on the GPU (docs/gpu.md).
Prints a markdown table and, as the last line, one JSON object; ``--write`` puts the table into docs/architectures.md.
Exits with 1 if a proof fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import proof  # noqa: E402
import synthetic  # noqa: E402
from raw import Raw  # noqa: E402

DOCUMENT = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- table: benchmarks/native_proof.py -->", "<!-- end of table -->"


def dump(model: Path, output: Path) -> None:
    """Write base logits and node counts of a model; this much a stock build can do."""
    import llama_cpp

    trace = proof.base_run(model)
    patched = np.array(hasattr(llama_cpp, "llama_init_control"))
    np.savez(output, logits=trace.logits, nodes=np.array(trace.nodes), patched=patched)


def build_stock() -> Path:
    """The stock wheel of the pinned source distribution, built once with pip into the cache."""
    pin = tomllib.loads((ROOT / "patches" / "pin.toml").read_text(encoding="utf-8"))
    name, version = pin["name"], pin["version"]
    folder = synthetic.cache_dir() / f"stock-{version}"
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-binary", name]
        subprocess.run([*command, "--wheel-dir", str(folder), f"{name}=={version}"], check=True)
    return Path(next(folder.glob("*.whl")))


def unpack(stock: Path, scratch: Path) -> Path:
    """The folder of a stock build, from a wheel or as it is."""
    if not stock.is_file():
        return stock
    zipfile.ZipFile(stock).extractall(scratch / "stock")
    return scratch / "stock"


def compare_with_stock(stock: Path, model: Path, output: Path) -> str:
    """Run the schedule on the stock build in a process of its own: "yes", "no", or that it crashed.

    Where it crashes there is nothing to compare: GCC 12 spoils its AMX code (series, patch 4).
    """
    command = [sys.executable, __file__, "--dump", str(model), str(output)]
    path = os.pathsep.join([str(stock), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode < 0:
        return f"stock crashes (signal {-done.returncode})"
    if done.returncode:
        raise SystemExit(f"the stock build failed on {model.name}:\n{done.stderr}")
    trace = proof.base_run(model)
    with np.load(output) as data:
        if data["patched"]:
            raise SystemExit(f"{stock} is not a stock build: it has llama_init_control")
        same = trace.logits.tobytes() == data["logits"].tobytes() and trace.nodes == data["nodes"].tolist()
    return "yes" if same else "no"


def table(rows: list[dict[str, Any]]) -> str:
    """The markdown table; columns are those that the document explains."""
    lines = ["| model | error | base error | as promised | nodes | as stock |", "|---|---|---|---|---|---|"]
    for row in rows:
        ok = "yes" if row["ok"] else "NO"
        cells = [f"{row['error']:.1e}", f"{row['base_error']:.1e}", ok, str(row["nodes_added_on"]), row["as_stock"]]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Replace the document's table."""
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--stock", type=Path, help="a stock wheel of the same source, or its unpacked folder")
    choice.add_argument("--build-stock", action="store_true", help="build that wheel with pip (minutes, once)")
    choice.add_argument("--dump", type=Path, nargs=2, help=argparse.SUPPRESS)
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", nargs="+", metavar="NAME", help="prove these models only")
    some.add_argument("--kinds", action="store_true", help="one model of each kind of head and of memory")
    parser.add_argument("--write", action="store_true", help="put the table into docs/architectures.md")
    options = parser.parse_args()
    if options.dump:
        dump(*options.dump)
        return 0
    stock = build_stock() if options.build_stock else options.stock
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        stock = stock and unpack(stock, scratch)
        for name in options.only or (synthetic.MODELS if options.kinds else synthetic.EVERYTHING):
            model = synthetic.write_architecture(scratch, name)
            result = proof.prove(model, proof.layouts_of(name))
            as_stock = compare_with_stock(stock, model, scratch / "stock.npz") if stock else "not compared"
            rows.append(asdict(result) | {"ok": result.ok, "as_stock": as_stock})
            model.unlink()
        refusals = {}
        for name in synthetic.REFUSED:
            with Raw(synthetic.write_architecture(scratch, name)) as raw:
                refusals[name] = raw.init_control(1)
    print(table(rows))
    print("\nllama_init_control on encoders:", ", ".join(f"{name} {code}" for name, code in refusals.items()), "\n")
    if options.write:
        write(table(rows))
    ok = all(row["ok"] and row["as_stock"] != "no" for row in rows) and set(refusals.values()) == {-2}
    print(json.dumps({"ok": ok, "refusals": refusals, "stock": stock is not None, "models": rows}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
