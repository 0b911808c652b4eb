"""Experiments: each runs small on real models, and its pieces mean what they say."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from aisp_local import Aligner, shipped
from aisp_local.bench import experiment_run
from aisp_local.bench.contest_report import interval
from aisp_local.bench.experiments import EXPERIMENTS, objectives
from aisp_local.bench.experiments.lab import SETTINGS, WORDS, Finding, Lab, in_order, rewards, row, variety, write
from aisp_local.bench.experiments.rewards import BEGINNINGS, NOISE, Noisy, _warned
from aisp_local.bench.experiments.spaces import _gaussianity, _moved, _shown, _states
from aisp_local.bench.tables import Table
from aisp_local.cli.bench import experiment as command
from aisp_local.cli.main import main
from aisp_local.controllers import create
from aisp_local.controllers.guard import MOSTLY_NOISE, Guard
from aisp_local.errors import DecodeError, InputError
from aisp_local.rewards.base import call_prefixes
from aisp_local.rewards.identity import Origin
from aisp_local.svg import heat_map
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Candidate, IterationStats, Result

SMALL = ["--small", "--max-prompts", "2", "--max-tokens", "12", "--threads", "1"]


INTERVAL = r"-?\d+\.\d\d \[-?\d+\.\d\d, -?\d+\.\d\d\]"


def stats(iteration: int, note: str | None = None) -> IterationStats:
    return IterationStats(iteration, 2, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, 0.0, note=note)


def letters(prompt: object, texts: Sequence[str]) -> list[float]:
    """Some count for more than others."""
    return [float(sum(map(ord, text))) - 101.5 * len(text) for text in texts]


def fake(reward: FakeReward | None = None, prompts: int = 3, max_tokens: int = 12) -> Lab:
    """A small one without a model."""
    engine = FakeEngine(d=4, vocabulary=12)
    reward = reward or FakeReward(letters)
    asked = [[{"role": "user", "content": str(i)}] for i in range(prompts)]
    return Lab(Aligner(engine, reward), asked, max_tokens, small=True)  # type: ignore[arg-type]


def column(table: Table, name: str) -> list[Any]:
    return [row[table.columns.index(name)] for row in table.rows]


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
    assert data["command"].startswith(f"aisp-local bench experiment {name} -o ") and f"`{data['command']}`" in text
    for plot in tmp_path.glob("*.svg"):
        assert plot.read_text(encoding="utf-8").startswith("<svg") and f"({plot.name})" in text


def test_those_there_are_and_those_there_are_not(tmp_path: Path) -> None:
    listed = CliRunner().invoke(main, ["bench", "experiment", "--list"]).output
    assert [line.split()[0] for line in listed.splitlines()] == list(EXPERIMENTS)
    for arguments, message in ((["magic", "-o", str(tmp_path)], "'magic' is unknown"), (["weights"], "with -o")):
        done = CliRunner().invoke(main, ["bench", "experiment", *arguments])
        assert done.exit_code == 2 and message in done.output


def test_how_many_prompts_each_takes_by_itself() -> None:
    more = {"adaptation": 8, "noise": 8, "lora": 8, "spaces": 8, "beginnings": 8, "map": 2}
    assert {name: each.prompts for name, each in EXPERIMENTS.items()} == dict.fromkeys(EXPERIMENTS, 4) | more
    shown = " ".join(CliRunner().invoke(main, ["bench", "experiment", "--help"]).output.split())
    assert "Default: each experiment's own, 2 to 8." in shown and "two and a half hours" in shown


@pytest.mark.native
@pytest.mark.parametrize(("given", "prompts"), [([], 3), (["--max-prompts", "5"], 5)])
def test_a_page_names_the_command_that_makes_it_again(
    given: list[str], prompts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labs: list[Lab] = []

    def run(lab: Lab) -> Finding:
        labs.append(lab)
        return Finding([], data=[len(lab.prompts)])

    monkeypatch.setitem(EXPERIMENTS, "lambda", replace(EXPERIMENTS["lambda"], prompts=3, run=run))
    own = tmp_path / "my rules.toml"
    own.write_text('format = 1\n[[part]]\nrule = "length"\nwords = [5, 9]\n', encoding="utf-8")
    out, settings = tmp_path / "out", ["-r", str(own), "--seed", "3", *given]
    done = CliRunner().invoke(main, ["bench", "experiment", "lambda", "-o", str(out), *settings])
    assert done.exit_code == 0, done.output
    assert [len(lab.prompts) for lab in labs] == [prompts]
    text, data = ((out / f"lambda.{kind}").read_text(encoding="utf-8") for kind in ("md", "json"))
    line = json.loads(data)["command"]
    assert f"`{line}`" in text and str(tmp_path) not in text + data
    words = shlex.split(line)
    assert words[:6] == ["aisp-local", "bench", "experiment", "lambda", "-o", "results"]
    assert sorted(words[6:]) == sorted(["-r", own.name, "--seed", "3", *given])
    with click.Context(command):
        assert command.make_parser(click.Context(command)).parse_args(words[3:])[0]["reward"] == own.name


def test_defaults_are_left_out_of_the_command() -> None:
    defaults = {parameter.name: parameter.default for parameter in command.params}
    assert defaults["max_tokens"] == experiment_run.MAX_TOKENS and defaults["seed"] == experiment_run.SEED
    experiment = EXPERIMENTS["noise"]
    usual = {"-m": None, "--max-prompts": None, "--max-tokens": 96, "--seed": 0, "--small": False}
    line = "aisp-local bench experiment noise -o results"
    assert experiment_run.command(experiment, usual) == line
    assert experiment_run.command(experiment, usual | {"--max-prompts": experiment.prompts}) == line
    other = {"-m": Path("/a/b/c.gguf"), "--max-prompts": 2, "--max-tokens": 12, "--seed": 1, "--small": True}
    line += " -m c.gguf --max-prompts 2 --max-tokens 12 --seed 1 --small"
    assert experiment_run.command(experiment, other) == line


def test_too_few_prompts_are_refused_before_anything_runs(tmp_path: Path) -> None:
    prompts = tmp_path / "one.json"
    prompts.write_text(json.dumps(dict.fromkeys(("tuning", "evaluation"), ["Tell me a story."])), encoding="utf-8")
    for given in (["--max-prompts", "1"], ["--prompts", str(prompts)]):
        arguments = ["weights", "adaptation", "-o", str(tmp_path / "out"), *given]
        done = CliRunner().invoke(main, ["bench", "experiment", *arguments])
        assert done.exit_code == 2 and "'adaptation'" in done.output and "--max-prompts 2 or more" in done.output
        assert not (tmp_path / "out").exists()


@pytest.mark.native
def test_what_cannot_run_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing adapter is told before hours of others, and an error ends one page only."""

    def runs(lab: Lab) -> Finding:
        return Finding([], data=[1])

    def fails(lab: Lab) -> Finding:
        raise DecodeError("too much noise")

    for name in EXPERIMENTS:
        monkeypatch.setitem(EXPERIMENTS, name, replace(EXPERIMENTS[name], run=fails if name == "map" else runs))
    own = tmp_path / "own.gguf"
    own.symlink_to(shipped.model())
    arguments = ["bench", "experiment", "-o", str(tmp_path / "out"), "-m", str(own), "--max-prompts", "2"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "lora is left out: give an adapter" in done.output
    assert "map failed: too much noise" in done.output and "error: map failed, for what is said above" in done.output
    assert {path.stem for path in (tmp_path / "out").glob("*.md")} == set(EXPERIMENTS) - {"map", "lora"}
    done = CliRunner().invoke(main, [*arguments[:4], "-m", str(own), "weights", "lora"])
    assert done.exit_code == 2 and "lora: give an adapter of this model with --lora" in done.output
    done = CliRunner().invoke(main, [*arguments, "map"])
    assert done.exit_code == 1 and "error: too much noise" in done.output


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("lora", "spaces")])
def test_rewards_that_are_not_finite_never_win(name: str, tmp_path: Path) -> None:
    """Figures are of the others, and a page says nothing that is no number; lora and spaces need a real model."""

    def some(prompt: object, texts: Sequence[str]) -> list[float]:
        wrong = [float("nan"), -float("inf")]
        return [wrong[len(text) % 2] if len(text) % 3 == 1 else float(len(text)) for text in texts]

    finding = EXPERIMENTS[name].run(fake(FakeReward(some)))
    text = write(tmp_path, EXPERIMENTS[name], finding, "about", "command")
    assert "nan" not in text.replace("nano", "") and "inf" not in text.split("Made again by")[1]
    assert "NaN" not in (tmp_path / f"{name}.json").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "map.md").mkdir()
    done = CliRunner().invoke(main, ["bench", "experiment", "weights", "map", "-o", str(tmp_path), *SMALL])
    assert done.exit_code == 2 and "map.md is a folder" in done.output and not (tmp_path / "weights.md").exists()


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


def test_a_noisy_reward_is_asked_as_the_one_below_it_would_be() -> None:
    class Below:
        name, background, prefix, unfinished = "below", True, True, False

        def score(self, prompt: object, texts: Sequence[str]) -> Any:
            return np.ones(len(texts), np.float32)

        def score_prefixes(self, prompt: object, texts: Sequence[str]) -> Any:
            return np.full(len(texts), 5.0, np.float32)

    noisy = Noisy(Below(), 0.5, 0.0)
    assert (noisy.background, noisy.prefix, noisy.unfinished) == (True, True, False)
    assert call_prefixes(noisy, "p", ["a"]).tolist() == [5.0] and noisy.score("p", ["a"]).tolist() == [1.0]
    assert Noisy(FakeReward(letters), 0.5, 1.0).unfinished


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


def test_warnings_of_noise_are_told_from_others() -> None:
    other = "answers repeat themselves: the control and its strength are halved"
    notes: list[list[str | None]] = [[None], [MOSTLY_NOISE], [other, None], [f"{other}; {MOSTLY_NOISE}"]]
    results = [
        replace(result(Candidate("a", 0.0, 1, 1)), iterations=[stats(1, note) for note in each]) for each in notes
    ]
    assert _warned(results) == (2, 2) and _warned(results[:1]) == (0, 0)
    guard, rng = Guard(), np.random.default_rng(0)
    for _ in range(3):
        guard.compare(np.repeat(np.arange(8), 4), rng.standard_normal(32))
    assert guard.noise() == MOSTLY_NOISE


def test_noise_is_compared_with_a_random_choice() -> None:
    lab = fake()
    found = NOISE.run(lab)
    table, data = found.tables[0], found.data[found.tables[0].title]
    assert column(table, "method") == ["score", "aisp", row("best-of-n"), "random choice"] * 2
    assert all(re.fullmatch(INTERVAL.replace("-?", "[+-]"), cell) for cell in column(table, table.columns[3]))
    warned = [column(table, name) for name in ("searches warned of noise", "warned of anything else")]
    for cells in warned:
        assert [cell for cell in cells if cell == "-"] == ["-"] * 2 and all(" of 3" in c for c in cells if c != "-")
    base, drawn = (
        rewards(lab.search("best-of-n", budget, 16, seed=seed, **SETTINGS["best-of-n"]))
        for budget, seed in ((16, 9), (32, 0))
    )
    chance = (drawn.mean(axis=1) - base.mean(axis=1)) / base.std(axis=1).mean()
    for share in (0.0, 1.0):
        (drew,) = [each for each in data if each["share"] == share and each["method"] == "random choice"]
        assert drew["true"] == pytest.approx(chance.mean(), abs=1e-6)
        assert drew["interval"] == pytest.approx(interval(chance), abs=1e-6) and drew["noise"] is None
    best = next(each for each in data if each["share"] == 0.0 and each["method"] == "best-of-n")
    assert best["seen"] == pytest.approx(best["true"]) and best["true"] > chance.mean()


def test_states_are_thinned_and_each_is_there_once() -> None:
    lab = fake(prompts=2, max_tokens=9)
    states, tokens = _states(lab)
    engine, found = FakeEngine(d=4, vocabulary=12), set()
    for z, token in zip(states, tokens, strict=True):
        (before,) = np.flatnonzero((engine._z == z).all(axis=1))
        found.add((int(before), int(token)))
    assert 4 < len(states) <= 2 * (1 + 4 * 4)  # of steps 0, 2, 4, 6, 8; the first is the same in all rollouts
    first = int(np.flatnonzero((engine._z == engine._z[1]).all(axis=1))[0])
    assert sum(bool((z == engine._z[first]).all()) for z in states) >= 2 and len(found) > 4
    many = _states(replace(lab, small=False))[0]
    assert len(states) < len(many) <= 2 * (1 + 64 * 4)


def test_gaussianity_is_told_token_by_token() -> None:
    """Gaussians about far means are Gaussian where one token is drawn, and not together."""
    rng = np.random.default_rng(0)
    sizes = [300, 250, 100, 60, 60, 60, 60, 60, 55, 20]
    tokens = np.repeat(np.arange(10), sizes)
    states = rng.standard_normal((len(tokens), 60)) + 6.0 * (tokens[:, None] % 2)
    states[tokens == 1] = rng.random((250, 60))

    def piece(token: int) -> bytes:
        return b"" if token == 2 else b"t%d" % token

    table, data = _gaussianity(states[rng.permutation(len(states))[:400]], states.astype(np.float32), tokens, piece, 48)
    assert column(table, "token drawn") == ["`'t0'`", "`'t1'`", "token 2", *(f"`'t{i}'`" for i in range(3, 8)), "any"]
    assert column(table, "states") == [*sizes[:8], 400]
    within = {row["token"]: row["within"] for row in data}
    assert within["`'t0'`"] > 0.85 and within["token 2"] > 0.85 and within["`'t1'`"] < 0.4 and within["any"] < 0.1
    few = _gaussianity(states, states.astype(np.float32), tokens, piece, 101)[0]
    assert column(few, "states") == [300, 250, len(states)]
    assert _shown(b" |\n", 3) == "`' \\|\\n'`"


def test_what_noise_adds_to_a_law_that_top_p_cuts() -> None:
    rng = np.random.default_rng(0)
    logits, noise = 3.0 * rng.standard_normal(50), 2.0 * rng.standard_normal((6, 50))

    def cut(x: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
        p = np.exp(x - x.max())
        order = np.argsort(-p)
        before = p[order].cumsum() / p.sum() - p[order] / p.sum()
        law = np.zeros(50)
        law[order[before < top_p]] = np.exp(x / temperature)[order[before < top_p]]
        return law / law.sum()

    for temperature, top_p in ((1.0, 1.0), (0.6, 1.0), (1.0, 0.9), (0.6, 0.9)):
        base, law = cut(logits, temperature, top_p), cut(logits, temperature, 1.0)
        added = np.mean([cut(logits + one, temperature, top_p) for one in noise], axis=0) - base
        found = _moved(logits, noise, temperature, top_p)
        assert found["outside"] == pytest.approx(added[np.argsort(-law)[20:]].sum(), abs=1e-5)
        assert found["unlikely"] == pytest.approx(added[law < 1e-4 * law.max()].sum(), abs=1e-5)
        assert found["nucleus"] == pytest.approx(added[cut(logits, temperature, 0.9) == 0].sum(), abs=1e-5)
        still = _moved(logits, 0 * noise, temperature, top_p)
        assert all(abs(value) < 1e-9 for value in still.values())
    lab = fake()
    table = EXPERIMENTS["spaces"].run(lab).tables[0]
    assert column(table, "top-p") == ["1", "1", "0.9", "0.9"] * 4
    sigmas = column(table, "sigma")
    assert sigmas[:2] == sigmas[2:4]


@pytest.mark.parametrize("known", [True, False])
def test_the_gap_to_an_optimum_is_there_where_it_is_known(known: bool) -> None:
    lab = fake()
    if known:
        lab.aligner.origins = replace(lab.aligner.origins, reward=Origin.of(WORDS))
    (table,) = EXPERIMENTS["convergence"].run(lab).tables
    assert ("gap to the optimum" in table.columns) == known == ("the optimum of the reward is 0" in table.title)
    assert {len(cells) for cells in table.rows} == {len(table.columns)}


def test_a_reward_of_ones_own_takes_the_place_of_the_shipped_one_in_every_wish() -> None:
    own = FakeReward(letters, name="own")
    for _, file, _, count in objectives.GOALS:
        wish = objectives._wish(file, own)
        first, *rules = wish.parts
        assert first.reward is own and first.label == "own" and first.normalise and len(rules) == 1
        assert rules[0].reward.score("p", ["the sad cat! " * 60])[0] < 0 < count("the sad cat! " * 60)


def test_answers_to_other_wishes_are_scored_by_the_learnt_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    def story(prompt: object, texts: Sequence[str]) -> list[float]:
        return [-2.0 * x for x in letters(prompt, texts)]

    monkeypatch.setattr(objectives, "_wish", lambda name, learnt: FakeReward(letters))
    found = EXPERIMENTS["objectives"].run(fake(FakeReward(story, name="own")))
    (table,) = found.tables
    cells = column(table, "own of score's answers over best-of-n's [95%]")
    assert all(re.fullmatch(INTERVAL.replace("-?", "[+-]"), cell) for cell in cells)
    for made in found.data:
        over, of_story = made["score over best-of-n"], made["own over best-of-n"]
        assert over[0] != 0 and of_story[0] == pytest.approx(-2 * over[0]) and of_story[1] < of_story[2]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("lambda", "best reward [95%]"),
        ("window", "best reward [95%]"),
        ("strength", "best of all [95%]"),
        ("blocks", "best of all [95%]"),
    ],
)
def test_mean_best_rewards_have_an_interval(name: str, title: str) -> None:
    table = EXPERIMENTS[name].run(fake()).tables[0]
    assert all(re.fullmatch(INTERVAL, cell) for cell in column(table, title)) and len(table.rows) >= 2
    assert {len(cells) for cells in table.rows} == {len(table.columns)}


def test_maps_say_that_they_are_means() -> None:
    assert all("means over 3 prompts" in table.title for table in EXPERIMENTS["map"].run(fake()).tables)


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
