"""What the native patch promises of a model, checked in one go: a row of the table of architectures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from oracle import Head
from raw import GPU_LAYERS, Array, Raw, Schedule, Trace, follow, logged

N, STEPS = 5, 8
Layout = tuple[int, bool]  # n_ubatch, unified cache
LAYOUTS: Sequence[Layout] = [(512, True), (512, False), (2, True), (2, False)]
NARROW: dict[str, Sequence[Layout]] = {
    "kimi-linear": [(512, True), (2, True)],  # llama.cpp aborts with a split cache
    "t5": [(512, True)],  # the same, and its encoder takes its input in one go
}


@dataclass
class Proof:
    """Errors are the largest over the layouts, and a mark is true if it holds for all of them."""

    model: str
    error: float = 0.0  # of a logit under control, against the oracle
    base_error: float = 0.0  # the same without control
    within_bound: bool = True
    prelogits_exact: bool = True  # bit-identical under control, and their controlled form is z + v bit for bit
    rows_independent: bool = True  # a row's control leaves the other rows bit-identical
    bit_identical: bool = True  # before, allocated and cleared
    nodes_added_off: int = 0
    nodes_added_on: int = 0  # by step

    @property
    def ok(self) -> bool:
        marks = (self.within_bound, self.prelogits_exact, self.rows_independent, self.bit_identical)
        return all(marks) and self.nodes_added_off == 0


def layouts_of(name: str) -> Sequence[Layout]:
    """The layouts in which llama.cpp decodes the model in several sequences."""
    return NARROW.get(name, LAYOUTS)


def base_run(path: Path) -> Trace:
    """The schedule of a proof without control, by kernels that the series leaves alone: a stock build can do it too."""
    with Raw(path, n_seq=N, count_nodes=True, exact=GPU_LAYERS == 0, repacked=False) as raw:
        return follow(raw, Schedule.make(raw.size, n=N, steps=STEPS))


def _max_error(head: Head, logits: Array, x: Array) -> float:
    decoded = ~np.isnan(logits[..., 0])
    return float(np.abs(logits[decoded] - head(x[decoded])).max())


def _prove_layout(proof: Proof, head: Head, path: Path, layout: Layout) -> None:
    with Raw(path, n_seq=N, n_ubatch=layout[0], unified=layout[1]) as raw:
        schedule = Schedule.make(raw.size, n=N, steps=STEPS)
        base = follow(raw, schedule, z=1)
        v = np.random.default_rng(1).standard_normal((N, STEPS, raw.d), np.float32)
        code = raw.init_control(STEPS)
        if code != 0:
            raise RuntimeError(f"llama_init_control returned {code}")
        for i in range(N):
            raw.set_control(i, v[i], p0=schedule.p0)
        moved, controlled = follow(raw, schedule, z=1), follow(raw, schedule, z=2)
        raw.clear_control()
        raw.set_control(2, v[2], p0=schedule.p0)
        one = follow(raw, schedule)
    assert base.z is not None and moved.z is not None and controlled.z is not None
    base_error, error = _max_error(head, base.logits, base.z), _max_error(head, moved.logits, base.z + v)
    proof.base_error, proof.error = max(proof.base_error, base_error), max(proof.error, error)
    # Rounding of activations is relative to the head's input, which the control lengthens.
    longer = np.sqrt(1 + np.mean(np.square(v)) / np.nanmean(np.square(base.z)))
    proof.within_bound &= bool(error <= 3 * longer * base_error + 1e-6)
    # CUDA's products take F32 as TF32, which rounds as well.
    proof.within_bound &= base_error <= (0.1 if head.rounds or GPU_LAYERS else 1e-5)
    # An ignored or misplaced control could not pass.
    proof.within_bound &= _max_error(head, moved.logits, base.z) > 10 * error
    proof.prelogits_exact &= moved.z.tobytes() == base.z.tobytes()
    proof.prelogits_exact &= np.array_equal(controlled.z, base.z + v, equal_nan=True) and controlled.same(moved)
    others = [i for i in range(N) if i != 2]
    proof.rows_independent &= one.logits[others].tobytes() == base.logits[others].tobytes()
    proof.rows_independent &= bool((one.logits[2] != base.logits[2]).any())


def _prove_off(proof: Proof, path: Path) -> None:
    with Raw(path, n_seq=N, count_nodes=True) as raw:
        schedule = Schedule.make(raw.size, n=N, steps=STEPS)
        before = follow(raw, schedule)
        raw.init_control(STEPS)
        allocated = follow(raw, schedule)
        v = np.random.default_rng(1).standard_normal((STEPS, raw.d), np.float32)
        for i in range(N):
            raw.set_control(i, v, p0=schedule.p0)
        controlled = follow(raw, schedule)
        raw.clear_control()
        cleared = follow(raw, schedule)
    proof.nodes_added_off = max(sum(t.nodes) - sum(before.nodes) for t in (allocated, cleared))
    proof.nodes_added_on = controlled.nodes[-1] - before.nodes[-1]
    proof.bit_identical = allocated.same(before) and cleared.same(before) and not controlled.same(before)


def prove(path: Path, layouts: Sequence[Layout] = LAYOUTS) -> Proof:
    """Five sequences that end at different times, in every layout. Raises RuntimeError if a model refuses."""
    proof = Proof(path.stem)
    head = Head(path)
    for layout in layouts:
        _prove_layout(proof, head, path, layout)
    _prove_off(proof, path)
    return proof


@dataclass
class Replay:
    """What a decode loop of constant rows does without a control, and with one that differs at every step."""

    model: str
    steps: int
    reused: tuple[int, int]  # steps for which llama.cpp kept its graph
    captured: tuple[int, int]  # CUDA graphs made
    replayed: tuple[int, int]  # graphs that CUDA launched again
    reset: tuple[int, int]  # graphs that CUDA gave up because something in them had changed
    digest: str  # of all logits: the same whether CUDA replays or launches kernel by kernel
    error: float  # of a logit under control, against the oracle
    base_error: float
    within_bound: bool  # as Proof's: a replayed graph reads the control of its own step

    @property
    def ok(self) -> bool:
        kept = self.reused[0] == self.reused[1] > 0 and self.reset[0] == self.reset[1]
        return kept and self.replayed[0] == self.replayed[1] and self.within_bound


def replay(path: Path, rows: int = 4, steps: int = 24) -> Replay:
    """Decode the same given tokens in both states; what CUDA did with its graphs is read from llama.cpp's log."""
    rng = np.random.default_rng(0)
    head = Head(path)
    with Raw(path, n_seq=rows) as raw:
        prompt, tokens = rng.integers(0, raw.size, 8), rng.integers(0, raw.size, (steps, rows))
        v = rng.standard_normal((rows, steps, raw.d), np.float32)

        def loop(z: int) -> tuple[Array, Array | None, int, list[str]]:
            raw.want_prelogits(z)
            raw.reset()
            raw.decode(prompt, range(len(prompt)), [0] * len(prompt), [0] * len(prompt))
            raw.fork(range(1, rows))
            before, logits, states = raw.reused, [], []
            with logged() as lines:
                for t in range(steps):
                    raw.decode(tokens[t], [len(prompt) + t] * rows, range(rows))
                    logits.append([raw.logits(i) for i in range(rows)])
                    states.append([raw.prelogits(i) for i in range(rows)] if z else [])
            return np.array(logits), np.array(states, np.float32) if z else None, raw.reused - before, lines

        if raw.init_control(steps) != 0:
            raise RuntimeError("llama_init_control failed")
        loop(0)
        off, _, reused_off, log_off = loop(0)
        _, z, _, _ = loop(1)
        for i in range(rows):
            raw.set_control(i, v[i], p0=len(prompt))
        loop(0)
        on, _, reused_on, log_on = loop(0)
    assert z is not None

    def count(text: str) -> tuple[int, int]:
        first, second = (sum(text in line for line in lines) for lines in (log_off, log_on))
        return first, second

    moved = v.transpose(1, 0, 2)
    base_error, error = _max_error(head, off, z), _max_error(head, on, z + moved)
    longer = np.sqrt(1 + np.mean(np.square(v)) / np.mean(np.square(z)))
    return Replay(
        path.stem,
        steps,
        (reused_off, reused_on),
        count("CUDA graph warmup complete"),
        count("CUDA Graph id"),
        count("CUDA graph warmup reset"),
        hashlib.sha256(off.tobytes() + on.tobytes()).hexdigest(),
        error,
        base_error,
        bool(error <= 3 * longer * base_error + 1e-6 and _max_error(head, on, z) > 10 * error),
    )
