"""How close exported rewards are to their models in PyTorch: by architecture and precision, in values and in order.

    python benchmarks/export_parity.py [--only Llama] [--json FILE]

Makes a small model with random weights and a tokenizer of its own for each architecture, exports it in each
precision, loads the folder with OnnxReward and compares it with transformers, each text alone and without padding.
Random weights are the worst case for few bits. The last model has trained weights: those of the shipped reward, in
float32 as its int8 file gives them. Needs: pip install 'aisp-local[export]'.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import hf_models  # noqa: E402

from aisp_local import shipped  # noqa: E402
from aisp_local.files import check_output, write_output  # noqa: E402
from aisp_local.reward_kit.export import PRECISIONS, export_reward  # noqa: E402
from aisp_local.reward_kit.export.parity import LIMITS  # noqa: E402
from aisp_local.reward_kit.export.quiet import quiet  # noqa: E402
from aisp_local.reward_kit.export.source import need  # noqa: E402
from aisp_local.reward_kit.train import backbone as backbones  # noqa: E402
from aisp_local.rewards import OnnxReward  # noqa: E402

SHIPPED = "Bert (shipped weights)"


def write_shipped(folder: Path) -> Path:
    """The shipped reward as a Hugging Face folder."""
    with quiet():
        found = backbones.load(shipped.reward(), new_head=False)
        found.model.save_pretrained(folder)
        found.tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Parity of exported rewards, by architecture and precision.")
    parser.add_argument("--only", action="append", choices=[*hf_models.FAMILIES, SHIPPED], help="these alone")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args()
    if options.json is not None:
        check_output(options.json)
    need()
    print("| architecture | input | precision | MB | export | max | mean | Kendall's tau | same order | by default |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for family in options.only or [*hf_models.FAMILIES, SHIPPED]:
            source = root / family
            if family == SHIPPED:
                write_shipped(source)
            else:
                hf_models.write(source, family)
            for precision in PRECISIONS:
                started = time.monotonic()
                # The order has a limit that no option lifts; here the numbers count, whatever they are.
                most, least = LIMITS[precision]
                LIMITS[precision] = (np.inf, 0.0)
                done = export_reward(source, root / "out", precision=precision, force=True)
                LIMITS[precision] = (most, least)
                seconds = time.monotonic() - started
                OnnxReward.load(root / "out")
                parity = done.parity
                worst, mean = parity.max_abs / parity.spread, parity.mean_abs / parity.spread
                verdict = "written" if worst <= most and parity.agreement >= least else "refused"
                numbers = f"{worst:.2g} | {mean:.2g} | {parity.kendall_tau:.3f} | {parity.agreement:.1%}"
                size = f"{done.n_bytes / 1e6:.2f} | {seconds:.1f} s"
                print(f"| {family} | {done.kind} | {precision} | {size} | {numbers} | {verdict} |", flush=True)
                results.append({"architecture": family, "seconds": seconds, "bytes": done.n_bytes, **asdict(parity)})
    if options.json is not None:
        write_output(options.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
