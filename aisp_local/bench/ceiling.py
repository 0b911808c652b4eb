"""What the machine reaches in simple loops: the measure of a step that is nothing but reading, or multiplying."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aisp_local.bench import machine
from aisp_local.bench.raw import RawLoop
from aisp_local.bench.tables import Table
from aisp_local.engine import LlamaEngine
from aisp_local.engine.head import has_tensor

BATCHES = (64, 128, 256, 512, 1024, 2048)


def reached(path: Path, rows: Sequence[int], threads: int, prompt: int, tokens: int, quick: bool = False) -> Table:
    """The speed of steps at the largest rates of reading and of multiplying that were seen here.

    Reading: loops over memory, or this model's own decoding of one row (which reads a small model from the caches).
    Multiplying: this build's prefill, at the best size of a batch. Both are what was reached, not what the hardware
    could do.
    """
    loops = machine.memory_bandwidth(threads, 64 if quick else 512)
    with LlamaEngine(path) as engine:
        model, weights = engine.model, path.stat().st_size
        each = model.kv_bytes_per_token
        embedding = model.n_vocab * engine.d
        tied = not has_tensor(path, "output.weight")
        body = model.n_parameters - (1 if tied else 2) * embedding
        size = body + embedding  # the embedding of a token is one row, not a product; the output matrix is one

        def bytes_of(cells: int) -> float:
            return weights * (size / model.n_parameters) + each * cells

        steps = 16 if quick else 64
        raw = RawLoop(model, rows=1, n_ctx=256, threads=threads, flash_attention=None)
        row = np.arange(steps, dtype=np.int32) % 200
        seconds = min(raw.replay(row[:2], [row]) for _ in range(5))
        raw.close()
        one_row = bytes_of(steps // 2) * steps / seconds
        products = {}
        for batch in BATCHES[:3] if quick else BATCHES:
            if batch > model.n_ctx_train:
                continue
            raw = RawLoop(model, rows=1, n_ctx=batch, threads=threads, flash_attention=None, batch=batch)
            seconds = min(raw.prefill(np.arange(batch, dtype=np.int32) % 200) for _ in range(3))
            raw.close()
            products[batch] = batch * (body + each // 2 * batch // 2) / seconds
    bandwidth, by = max((loops, "a loop over memory"), (one_row, "one row's decoding"))
    best = max(products, key=lambda batch: products[batch])
    table = Table(
        "reached",
        f"Reached here: {path.stem}, {bandwidth / 2**30:.1f} GiB/s by {by} (a loop over memory: {loops / 2**30:.1f}) "
        f"with {threads} threads, {products[best] / 1e9:.0f} billion multiply-adds/s by a prefill of {best}",
        [
            "rollouts",
            "MiB read a step",
            "million multiply-adds",
            "tokens/s of such reading",
            "tokens/s of such products",
        ],
    )
    for n in rows:
        read = bytes_of(prompt + n * tokens // 2)
        work = n * (size + each // 2 * (prompt + tokens // 2))
        table.rows.append([n, read / 2**20, work / 1e6, n * bandwidth / read, n * products[best] / work])
    return table
