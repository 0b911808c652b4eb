"""Prove the native patch: synthetic models against a numpy oracle, and bit for bit against a stock build.

    python benchmarks/native_proof.py [--stock WHEEL_OR_FOLDER | --build-stock] [--models FOLDER]

``--models`` proves the GGUFs of a folder instead, for example those that llama.cpp's own ``test-llama-archs -o FOLDER``
writes: one of every architecture that it can make up (patches/README.md says how to build it).

Prints a markdown table and, as the last line, one JSON object. Exits with 1 if a proof fails.
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
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import synthetic  # noqa: E402
from oracle import Head  # noqa: E402
from raw import Array, Raw, Schedule, Trace, follow  # noqa: E402

N, STEPS = 5, 8
LAYOUTS = [(512, True), (512, False), (2, True), (2, False)]


def base_run(path: Path) -> Trace:
    with Raw(path, n_seq=N, count_nodes=True) as raw:
        return follow(raw, Schedule.make(raw.size, n=N, steps=STEPS))


def dump(model: Path, output: Path) -> None:
    """Write base logits and node counts of a model; this much a stock build can do."""
    import llama_cpp

    trace = base_run(model)
    patched = np.array(hasattr(llama_cpp, "llama_init_control"))
    np.savez(output, logits=trace.logits, nodes=np.array(trace.nodes), patched=patched)


def max_error(head: Head, logits: Array, x: Array) -> float:
    decoded = ~np.isnan(logits[..., 0])
    return float(np.abs(logits[decoded] - head(x[decoded])).max())


def prove(path: Path) -> dict[str, Any]:
    """Every property of one model; the errors are the largest over the batch layouts."""
    head = Head(path)
    row: dict[str, Any] = {"model": path.stem, "error": 0.0, "base_error": 0.0, "rows_independent": True}
    row |= {"z_unchanged": True, "within_bound": True}
    for n_ubatch, unified in LAYOUTS:
        with Raw(path, n_seq=N, n_ubatch=n_ubatch, unified=unified) as raw:
            schedule = Schedule.make(raw.size, n=N, steps=STEPS)
            base = follow(raw, schedule, z=True)
            v = np.random.default_rng(1).standard_normal((N, STEPS, raw.d), np.float32)
            if raw.init_control(STEPS) != 0:
                raise SystemExit(f"{path.stem}: llama_init_control refused the model")
            for i in range(N):
                raw.set_control(i, v[i], p0=schedule.p0)
            moved = follow(raw, schedule, z=True)
            raw.clear_control()
            raw.set_control(2, v[2], p0=schedule.p0)
            one = follow(raw, schedule)
        assert base.z is not None and moved.z is not None
        base_error, error = max_error(head, base.logits, base.z), max_error(head, moved.logits, base.z + v)
        row["base_error"], row["error"] = max(row["base_error"], base_error), max(row["error"], error)
        # Rounding of activations is relative to the head's input, which the control lengthens.
        longer = np.sqrt(1 + np.mean(np.square(v)) / np.nanmean(np.square(base.z)))
        row["within_bound"] &= bool(error <= 3 * longer * base_error + 1e-6)
        row["z_unchanged"] &= moved.z.tobytes() == base.z.tobytes()
        others = [i for i in range(N) if i != 2]
        row["rows_independent"] &= one.logits[others].tobytes() == base.logits[others].tobytes()
        row["rows_independent"] &= bool((one.logits[2] != base.logits[2]).any())
    with Raw(path, n_seq=N, count_nodes=True) as raw:
        schedule = Schedule.make(raw.size, n=N, steps=STEPS)
        before = follow(raw, schedule)
        raw.init_control(STEPS)
        allocated = follow(raw, schedule)
        for i in range(N):
            raw.set_control(i, v[i], p0=schedule.p0)
        controlled = follow(raw, schedule)
        raw.clear_control()
        cleared = follow(raw, schedule)
    row["nodes_added_when_off"] = max(sum(t.nodes) - sum(before.nodes) for t in (allocated, cleared))
    row["nodes_added_a_step"] = controlled.nodes[-1] - before.nodes[-1]
    row["bit_identical"] = allocated.same(before) and cleared.same(before) and not controlled.same(before)
    row["ok"] = row["nodes_added_when_off"] == 0 and all(
        row[key] for key in ("within_bound", "z_unchanged", "rows_independent", "bit_identical")
    )
    return row


def prove_apart(path: Path) -> dict[str, Any]:
    """The same in a process of its own, for models on which llama.cpp itself may abort."""
    done = subprocess.run([sys.executable, __file__, "--prove", str(path)], capture_output=True, text=True)
    if done.returncode == 0:
        return dict(json.loads(done.stdout))
    asserted = [line.split(": ", 1)[-1] for line in done.stderr.splitlines() if "GGML_ASSERT" in line]
    reason = asserted[0] if asserted else (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return {"model": path.stem, "ok": False, "failed": reason}


def build_stock() -> Path:
    """The stock wheel of the pinned source distribution, built once with pip into the cache."""
    pin = tomllib.loads((ROOT / "patches" / "pin.toml").read_text(encoding="utf-8"))
    name, version = pin["name"], pin["version"]
    folder = synthetic.cache_dir() / f"stock-{version}"
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-binary", name]
        subprocess.run([*command, "--wheel-dir", str(folder), f"{name}=={version}"], check=True)
    return Path(next(folder.glob("*.whl")))


def compare_with_stock(stock: Path, models: Path, rows: list[dict[str, Any]], scratch: Path) -> None:
    """Run the same schedules on the stock build, each in a process of its own, and compare.

    Where the stock build crashes there is nothing to compare: GCC 12 spoils its AMX code (series, patch 4).
    """
    if stock.is_file():
        zipfile.ZipFile(stock).extractall(scratch / "stock")
        stock = scratch / "stock"
    output = scratch / "stock.npz"
    for row in rows:
        if "failed" in row:
            continue
        model = models / f"{row['model']}.gguf"
        command = [sys.executable, __file__, "--dump", str(model), str(output)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(stock)})
        if done.returncode < 0:
            row["stock_identical"] = row["stock_nodes_equal"] = f"stock crashed, signal {-done.returncode}"
            continue
        if done.returncode:
            raise SystemExit(f"the stock build failed on {model}")
        trace = base_run(model)
        with np.load(output) as data:
            if data["patched"]:
                raise SystemExit(f"{stock} is not a stock build: it has llama_init_control")
            row["stock_identical"] = trace.logits.tobytes() == data["logits"].tobytes()
            row["stock_nodes_equal"] = trace.nodes == data["nodes"].tolist()
        row["ok"] = row["ok"] and row["stock_identical"] and row["stock_nodes_equal"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--stock", type=Path, help="a stock wheel of the same source, or its unpacked folder")
    choice.add_argument("--build-stock", action="store_true", help="build that wheel with pip (minutes, once)")
    choice.add_argument("--dump", type=Path, nargs=2, help=argparse.SUPPRESS)
    choice.add_argument("--prove", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help="GGUFs to prove instead of the synthetic ones")
    options = parser.parse_args()
    if options.dump:
        dump(*options.dump)
        return 0
    if options.prove:
        print(json.dumps(prove(options.prove)))
        return 0
    stock = build_stock() if options.build_stock else options.stock
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if options.models:
            models = options.models
            rows = [prove_apart(path) for path in sorted(models.glob("*.gguf"))]
        else:
            models = scratch / "models"
            models.mkdir()
            rows = [prove(path) for path in synthetic.write_models(models).values()]
        if stock is not None:
            compare_with_stock(stock, models, rows, scratch)
        refused = synthetic.write_eurobert(scratch / "eurobert.gguf")
        with Raw(refused) as raw:
            refusal = raw.init_control(STEPS)
    failed = [row for row in rows if "failed" in row]
    proved = [row for row in rows if "failed" not in row]
    columns = [key for key in proved[0] if key != "within_bound"]
    print("| " + " | ".join(column.replace("_", " ") for column in columns) + " |")
    print("|" + "---|" * len(columns))
    for row in proved:
        cells = [f"{row[c]:.1e}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        print("| " + " | ".join(cells) + " |")
    for row in failed:
        print(f"\nnot proved: {row['model']}: {row['failed']}")
    ok = all(row["ok"] for row in rows) and refusal == -2
    print(f"\nllama_init_control on an encoder (eurobert): {refusal}, expected -2\n")
    print(json.dumps({"ok": ok, "refusal": refusal, "stock": stock is not None, "models": rows}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
