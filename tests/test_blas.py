"""numpy's products leave the cores to the threads that decode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_processor import CHAT, Processor
from threadpoolctl import threadpool_info, threadpool_limits

from aisp_local import shipped
from aisp_local.engine import LlamaEngine
from aisp_local.engine.head import OutputHead
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FloatArray, Sampling, Step

pytestmark = pytest.mark.native


def threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.fixture
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(shipped.model(), threads=1) as made:
        if made.offloaded:
            pytest.skip("where a GPU decodes, the cores are free")
        yield made


@pytest.fixture
def two() -> Iterator[None]:
    with threadpool_limits(2, "blas"):
        if not threads():
            pytest.skip("numpy's BLAS has no number of threads to set")
        assert set(threads()) == {2}
        yield


@pytest.mark.usefixtures("two")
def test_a_processor_has_one_thread(engine: LlamaEngine) -> None:
    seen: list[list[int]] = []

    def watches(step: Step) -> FloatArray:
        seen.append(threads())
        return step.logits

    controls = Controls(2, sampling=Sampling(0.8), processor=Processor(watches))
    engine.rollout(CHAT, controls, max_tokens=3, seeds=RowSeeds(0))
    assert seen and all(set(found) == {1} for found in seen)
    assert set(threads()) == {2}


@pytest.mark.usefixtures("two")
def test_exact_kl_has_one_thread(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    project = OutputHead.project

    def watched(head: OutputHead, prelogits: Any) -> Any:
        seen.append(threads())
        return project(head, prelogits)

    monkeypatch.setattr(OutputHead, "project", watched)
    controls = Controls(2, vectors=np.ones((2, 1, engine.d), np.float32), held=True)
    out = engine.rollout(CHAT, controls, max_tokens=3, seeds=RowSeeds(0), want=frozenset({"kl"}))
    assert out.kl is not None and (out.kl > 0).all()
    assert seen and all(set(found) == {1} for found in seen)
    assert set(threads()) == {2}


@pytest.mark.usefixtures("two")
def test_what_a_processor_raises_gives_the_threads_back(engine: LlamaEngine) -> None:
    def fails(step: Step) -> FloatArray:
        raise RuntimeError("as asked")

    with pytest.raises(RuntimeError, match="as asked"):
        engine.rollout(CHAT, Controls(1, processor=Processor(fails)), max_tokens=3, seeds=RowSeeds(0))
    assert set(threads()) == {2}


OVERLAP = """
import json
from threading import Event, Thread
import numpy
from threadpoolctl import threadpool_info
from aisp_local.engine.blas import one_thread

def threads():
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

before, entered, leave = threads(), Event(), Event()

def first():
    with one_thread():
        entered.set()
        leave.wait(10)

other = Thread(target=first)
other.start()
assert entered.wait(10)
with one_thread():
    within = threads()
    leave.set()
    other.join()
print(json.dumps([before, within, threads()]))
"""


def test_two_who_overlap_leave_what_was_there() -> None:
    """In a process of its own, whose threads nobody else holds: of two engines both decode at once."""
    command, environment = [sys.executable, "-c", OVERLAP], {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, within, after = json.loads(done.stdout)
    if set(before) != {2}:
        pytest.skip("numpy's BLAS has one thread here, or no number of them to set")
    assert set(within) == {1} and after == before
