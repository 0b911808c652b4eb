"""`aisp-local bench speed`: it runs, says what it measured, and keeps what else is in the report."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from aisp_local.bench import sizes, speed
from aisp_local.bench.tables import paired, ratio
from aisp_local.cli.main import main
from aisp_local.errors import InputError

pytestmark = pytest.mark.native


def test_every_item_on_the_shipped_model(tmp_path: Path) -> None:
    report = tmp_path / "RESULTS.md"
    report.write_text("# Results\n\nBy hand.\n", encoding="utf-8")
    first, *others = (item for item in speed.ITEMS if item != "growth")
    items = ["--only", first, "--only", ",".join(others)]
    done = CliRunner().invoke(main, ["bench", "speed", "--quick", *items, "--report", str(report)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])
    names = [table["name"] for table in found["tables"]]
    assert names[0] == "reached"  # before anything is compared with it
    assert set(names) == {"reached", "raw", "methods", "timeline", "many", "peers", "memory"}
    by = {table["name"]: table["rows"] for table in found["tables"]}
    assert [row[0] for row in by["raw"]] == [1, 1, 8, 8]
    assert all(row[2] > 0 and row[3] > 0 for row in by["raw"])
    assert by["methods"][0][0] == "best-of-n" and by["methods"][0][2].startswith("1.000")
    many = by["many"]
    assert [row[1] for row in many] == [4, 8, 8, 4]
    assert all(row[2] > 0 and 0 < float(row[4].rstrip("%")) <= 100 for row in many)
    assert many[0][3].startswith("1.000")
    assert abs(by["memory"][0][4] - 1) < 0.5  # a few megabytes here: allocators round
    assert "sha256 of storyteller.gguf" in found["machine"]
    text = report.read_text(encoding="utf-8")
    assert text.startswith("# Results\n\nBy hand.\n") and "### Reached here" in text
    assert list(tmp_path.iterdir()) == [report]


def test_growth_is_small_with_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    repeats: list[int] = []

    def counted(runs: Any, count: int) -> Any:
        repeats.append(count)
        return paired(runs, count)

    monkeypatch.setattr(sizes, "paired", counted)
    done = CliRunner().invoke(main, ["bench", "speed", "--quick", "--only", "growth", "--repeats", "2"])
    assert done.exit_code == 0, done.output
    tables = [
        table for table in json.loads(done.stdout.strip().splitlines()[-1])["tables"] if table["name"] == "growth"
    ]
    grown = ("rollouts", "prompt tokens", "new tokens", "control steps", "vocabulary", "width", "iterations")
    assert [table["title"].removeprefix("Growth with ").split(" (")[0] for table in tables] == list(grown)
    assert all(row[1] > 0 and row[2] > 0 for table in tables for row in table["rows"])
    assert repeats == [2] * 7
    assert sum(path.stat().st_size for path in (tmp_path / "aisp-local-benchmarks").iterdir()) < 4 * 2**20


def test_a_report_is_replaced_between_its_marks(tmp_path: Path) -> None:
    report = tmp_path / "RESULTS.md"
    speed.write_report(report, "one")
    report.write_text("before\n" + report.read_text(encoding="utf-8") + "after\n", encoding="utf-8")
    speed.write_report(report, "two")
    text = report.read_text(encoding="utf-8")
    assert text == f"before\n{speed.BEGIN}\ntwo\n{speed.END}\nafter\n"


def test_pairs_run_in_turned_order() -> None:
    order: list[int] = []

    def run(i: int) -> float:
        order.append(i)
        return float(len(order))

    seconds = paired([lambda: run(0), lambda: run(1)], 3)
    assert order == [1, 0, 0, 1, 1, 0, 0, 1]  # the first round is not counted
    np.testing.assert_array_equal(seconds, [[3, 4], [6, 5], [7, 8]])
    assert ratio(np.array([2.0, 4.0, 9.0]), np.array([1.0, 2.0, 3.0])) == [2.0, 2.0, 2.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only nothing is unknown"),
        (["-m", "missing.gguf"], "does not exist"),
        (["--report", "missing/RESULTS.md"], "the folder missing does not exist"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["bench", "speed", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_report_is_not_added_to_another_file(tmp_path: Path) -> None:
    other, own, page = tmp_path / "t.json", tmp_path / "report.txt", tmp_path / "page.md"
    other.write_text("{}\n")
    page.write_text("# A page\n")
    speed.write_report(own, "one")
    for path in (own, page, tmp_path / "new.txt"):
        speed.check_report(path)
    with pytest.raises(InputError, match="is there and no Markdown file"):
        speed.check_report(other)
