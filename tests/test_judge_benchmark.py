"""benchmarks/judge.py: what it makes of a judge that agrees, of one that does not, and of the shipped model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aisp_local.rewards import CallableReward
from aisp_local.testing import FakeEngine

PATH = Path(__file__).parents[1] / "benchmarks" / "judge.py"
OPTIONS = argparse.Namespace(
    budgets=[4, 16], strong=32, rollouts=24, rows=8, max_tokens=8, seed=0, examples=2, prompts=3
)


@pytest.fixture
def judge() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("judge_benchmark", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def late_letters(sign: float) -> CallableReward:
    return CallableReward(
        lambda prompt, texts: [sign * sum(ord(c) * (i + 1) for i, c in enumerate(text)) for text in texts]
    )


def test_a_judge_that_agrees_and_one_that_does_not(judge: Any) -> None:
    for sign in (1.0, -1.0):
        found = judge.measure(FakeEngine(), late_letters(1.0), late_letters(sign), ["a", "b", "c"], OPTIONS)
        spearman, kendall, alike = found["agreement"]
        assert spearman["mean"] == pytest.approx(sign) and kendall["mean"] == pytest.approx(sign)
        assert sign * (alike["mean"] - 0.5) > 0.02  # many ties
        assert [(row["method"], row["rollouts"]) for row in found["curve"]] == [
            ("best-of-n", 4),
            ("best-of-n", 16),
            ("aisp-held", 4),
            ("aisp-held", 16),
            ("aisp-held", 32),
        ]
        for row in found["curve"]:
            np.testing.assert_allclose(np.sort(row["judge"]), np.sort(sign * np.array(row["reward"])))
        rewards = [row["reward"][0] for row in found["curve"]]
        assert 0 < rewards[0] < rewards[1] and rewards[2] <= rewards[3] <= rewards[4]
        assert len(found["hacked"]) == (2 if sign < 0 else 0)
        for one in found["hacked"]:
            assert one["judge_gain"] == pytest.approx(-one["reward_gain"]) and one["text"]
        assert ("None." in judge.report(found, False)) == (sign > 0)


def test_rank_correlations_with_ties(judge: Any) -> None:
    a, b = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0, 2.0])
    assert judge.kendall(a, b) == pytest.approx(2 / 5)  # of 6 pairs 3 agree, 1 does not; one tie in each
    assert judge.agreement(a, b) == pytest.approx((3 + 2 * 0.5) / 6)
    assert np.isnan(judge.kendall(a, np.ones(4)))


@pytest.mark.native
def test_the_command(judge: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = tmp_path / "names.toml"
    reward.write_text('format = 1\n[[part]]\nrule = "required"\nwords = ["and", "the", "she", "big"]\n')
    small = ["--prompts", "2", "--rollouts", "6", "--budgets", "4", "8", "--strong", "16", "--max-tokens", "24"]
    judge.main([str(reward), *small, "--rows", "8", "--markdown", "--json", str(tmp_path / "found.json")])
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["reward"] == "names" and found["judge"] == "story-judge" and found["prompts"] == 2
    assert "| method | rollouts |" in shown and "| aisp-held | 16 |" in shown
    assert np.isfinite([row["reward"] for row in found["curve"]]).all()
    with pytest.raises(SystemExit):
        judge.main(["--prompts", "99"])
