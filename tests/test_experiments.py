"""Experiments: each runs small on real models, and its pieces mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from aisp_local import Aligner
from aisp_local.bench.experiments import EXPERIMENTS
from aisp_local.bench.experiments.lab import Lab, in_order, rewards, variety
from aisp_local.bench.experiments.rewards import BEGINNINGS, Noisy
from aisp_local.bench.experiments.spaces import _gaussianity
from aisp_local.cli.main import main
from aisp_local.controllers import create
from aisp_local.errors import InputError
from aisp_local.svg import heat_map
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Candidate, IterationStats, Result

SMALL = ["--small", "--max-prompts", "2", "--max-tokens", "12", "--threads", "1"]


def stats(iteration: int) -> IterationStats:
    return IterationStats(iteration, 2, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, 0.0)


def result(*candidates: Candidate) -> Result:
    iterations = [stats(i + 1) for i in range(max(c.iteration for c in candidates))]
    return Result("a", 1.0, "aisp", 4, 0, candidates, iterations, "complete", 1.0, 9)


@pytest.mark.native
@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_runs(name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "experiment", name, "-o", str(tmp_path), *SMALL])
    assert done.exit_code == 0, done.output
    text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    experiment = EXPERIMENTS[name]
    assert experiment.question in text and experiment.expected in text and text.count("|---|") >= 1
    data = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert data["experiment"] == name and data["data"]
    for plot in tmp_path.glob("*.svg"):
        assert plot.read_text(encoding="utf-8").startswith("<svg") and f"({plot.name})" in text


def test_those_there_are_and_those_there_are_not(tmp_path: Path) -> None:
    listed = CliRunner().invoke(main, ["bench", "experiment", "--list"]).output
    assert [line.split()[0] for line in listed.splitlines()] == list(EXPERIMENTS)
    for arguments, message in ((["magic", "-o", str(tmp_path)], "'magic' is unknown"), (["weights"], "with -o")):
        done = CliRunner().invoke(main, ["bench", "experiment", *arguments])
        assert done.exit_code == 2 and message in done.output


def test_noise_belongs_to_the_text() -> None:
    reward = FakeReward(lambda prompt, texts: [float(len(text)) for text in texts])
    texts = ["x" * (i % 7) + str(i) for i in range(2000)]
    true = reward.score("p", texts).astype(np.float64)
    spread = float(true.std())
    for share in (0.0, 0.2, 0.5, 0.8):
        seen = Noisy(reward, share, spread).score("p", texts)
        np.testing.assert_array_equal(seen, Noisy(reward, share, spread).score("other", texts[:]))
        assert np.corrcoef(seen, true)[0, 1] ** 2 == pytest.approx(1 - share, abs=0.04)
    assert abs(np.corrcoef(Noisy(reward, 1.0, spread).score("p", texts), true)[0, 1]) < 0.08


def test_more_of_a_response_tells_more_of_its_score() -> None:
    reward = FakeReward(lambda prompt, texts: [float(sum(map(ord, text))) - 100.0 * len(text) for text in texts])
    lab = Lab(Aligner(FakeEngine(d=4, vocabulary=12), reward), ["a", "b", "c"], max_tokens=40)
    found = list(BEGINNINGS.run(lab).data.values())
    assert found == sorted(found) and 0.2 < found[0] < found[1] < 0.9 < found[-1] < 1.0


def test_order_rewards_and_variety() -> None:
    one = result(
        Candidate("a b c d", 3.0, 2, 1),
        Candidate("x y z", 1.0, 1, 2),
        Candidate("q", 0.0, 1, 1),
        Candidate("a b c", 2.0, 2, 2),
    )
    assert [c.reward for c in in_order(one)] == [0.0, 1.0, 3.0, 2.0]
    np.testing.assert_array_equal(rewards([one]), [[0.0, 1.0, 3.0, 2.0]])
    assert variety([one]) == pytest.approx(2 / 3)  # of the last iteration: abc, bcd, abc


def test_gaussianity_tells_a_gaussian_from_others() -> None:
    rng = np.random.default_rng(0)
    gaussian = _gaussianity(rng.standard_normal((400, 60))).rows[0]
    uniform = _gaussianity(rng.random((400, 60))).rows[0]
    assert int(str(gaussian[-1]).rstrip("%")) >= 85 and int(str(uniform[-1]).rstrip("%")) <= 20


def test_a_mean_that_stays() -> None:
    mean = np.full((6, 4), 2.0, np.float32)
    moved = create("aisp-static", d=4, max_tokens=6, seed=0, mean=mean)
    plain = create("aisp-static", d=4, max_tokens=6, seed=0)
    for _ in range(2):
        a, b = moved.ask(3).vectors, plain.ask(3).vectors
        assert a is not None and b is not None
        np.testing.assert_allclose(a, b + 2.0, rtol=1e-6)
    with pytest.raises(InputError, match="must be"):
        create("aisp-static", d=4, max_tokens=6, seed=0, mean=mean[:2])


def test_a_search_that_fails_is_raised() -> None:
    def fails(prompt: object, texts: object) -> list[float]:
        raise ValueError("no")

    from aisp_local import Aligner

    lab = Lab(Aligner(FakeEngine(), FakeReward(fails)), [[{"role": "user", "content": "p"}]], 8)
    with pytest.raises(Exception, match="no"):
        lab.search("best-of-n", 4, 2)


def test_heat_maps_show_every_value() -> None:
    svg = heat_map("t", ("rows", ["a", "b"]), ("columns", ["c"]), [[1.5], [float("nan")]], [[True], [False]])
    assert svg.count("<rect") == 3 and "1.5" in svg and "nan" in svg and svg.count('stroke-width="3"') == 1
