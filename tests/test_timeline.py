"""The timeline of a run: trace events that Chrome and Perfetto take."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aisp_local import Aligner
from aisp_local.engine import LlamaEngine
from aisp_local.errors import InputError
from aisp_local.shipped import model
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.timeline import OFF, Timeline
from aisp_local.types import Prompt

MICROSECOND_DIGITS = 0.0015  # ts and dur are written to the nanosecond


def vowels(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


class Background(FakeReward):
    background = True


def check(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The events of a trace file by thread, after a look at every one of them."""
    data = json.loads(path.read_text(encoding="utf-8"))
    assert set(data) == {"traceEvents", "displayTimeUnit"}
    names: dict[int, str] = {}
    spans: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in data["traceEvents"]:
        assert event["pid"] == 0 and isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and event["args"]["name"]
            if event["name"] == "thread_name":
                names[event["tid"]] = event["args"]["name"]
        else:
            assert event["ph"] == "X" and event["name"] and event["ts"] >= 0 and event["dur"] >= 0
            spans[names[event["tid"]]].append(event)
    for events in spans.values():
        open_until: list[float] = []
        for event in events:
            begin, end = event["ts"], event["ts"] + event["dur"]
            while open_until and open_until[-1] <= begin + MICROSECOND_DIGITS:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + MICROSECOND_DIGITS, "neither inside nor after"
            open_until.append(end)
    return spans


@pytest.mark.native
@pytest.mark.parametrize("background", [False, True])
def test_a_run_is_drawn_thread_by_thread(background: bool, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    reward = (Background if background else FakeReward)(vowels)
    with Aligner(LlamaEngine(model(), threads=1), reward) as aligner:
        aligner.generate("Once upon a time", budget=12, n=4, max_tokens=8, timeline=path, baseline=True, selection=0.0)
        assert aligner.engine.timeline is OFF
        spans = check(path)
        main = threading.current_thread().name
        scoring = main if not background else "aisp-local-reward_0"
        assert set(spans) == {main, scoring}
        names = [event["name"] for event in spans[main]]
        assert names.count("update") == names.count("ask") == 3
        assert names.count("decode") == names.count("sample") == 3 * 8 + 8
        assert sum(event["name"] == "score" for event in spans[scoring]) == 3
        if background:
            assert {event["name"] for event in spans[scoring]} == {"score"}
        aligner.generate_many(["One", "Two"], budget=8, n=4, max_tokens=8, timeline=path, selection=0.0)
        assert sum(event["name"] == "update" for event in check(path)[main]) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    engine = FakeEngine()
    with pytest.raises(ZeroDivisionError):
        options: Any = {"budget": 2, "n": 2, "max_tokens": 4, "timeline": path}
        Aligner(engine, FakeReward(vowels)).generate("p", on_progress=lambda _: 1 // 0, **options)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("trace.json", "old")]
    aligner = Aligner(engine, FakeReward(vowels))
    aligner.generate("p", budget=2, n=2, max_tokens=4, timeline=path)
    assert "update" in path.read_text()
    for nowhere, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "trace.json", "does not exist")):
        calls: list[int] = []
        with pytest.raises(InputError, match=message):
            aligner.generate("p", budget=2, max_tokens=4, timeline=nowhere, on_progress=lambda _, c=calls: c.append(1))
        assert not calls  # before the search is paid for


def test_spans_nest_and_threads_of_one_name_are_told_apart(tmp_path: Path) -> None:
    timeline = Timeline()

    def work() -> None:
        with timeline.span("outer"):
            for _ in range(50):
                with timeline.span("inner"):
                    pass

    threads = [threading.Thread(target=work, name=f"worker {i}") for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    timeline.write(tmp_path / "trace.json")
    spans = check(tmp_path / "trace.json")
    assert {name: len(events) for name, events in spans.items()} == {f"worker {i}": 51 for i in range(3)}
    assert timeline.seconds()["outer"] >= timeline.seconds()["inner"] > 0
    with OFF.span("nothing"):
        pass
    assert OFF.seconds() == {}


@pytest.mark.native
def test_two_threads_of_one_engine_have_a_timeline_each(tmp_path: Path) -> None:
    """And what is not recorded leaves no trace in another's."""
    with LlamaEngine(model(), threads=1) as engine:
        aligner = Aligner(engine, Background(vowels))
        paths = [tmp_path / "a.json", None, tmp_path / "b.json"]

        def search(path: Path | None) -> None:
            for _ in range(3):
                aligner.generate("Once", method="best-of-n", n=4, budget=8, max_tokens=12, timeline=path)

        threads = [threading.Thread(target=search, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.timeline is OFF
    for path in paths:
        if path is not None:
            names = [event["name"] for events in check(path).values() for event in events]
            # Two iterations of at most 12 steps, and their two batches of rewards.
            assert 2 <= names.count("decode") <= 24 and names.count("score") == 2
