"""ARGS and RE-Control, methods that change logits between two decode steps, against plain references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from aisp_local import Aligner, Result, shipped
from aisp_local.bench import value as training
from aisp_local.cli.main import main
from aisp_local.controllers import create
from aisp_local.controllers.re_control import ReControl, Value
from aisp_local.engine import LlamaEngine
from aisp_local.engine.sampling import log_softmax
from aisp_local.errors import InputError
from aisp_local.rewards.base import call
from aisp_local.seeds import RowSeeds
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Controls, FloatArray, Message, Sampling, Step

CHAT: list[Message] = [{"role": "user", "content": "Tell me a story about a fox."}]


def letters(prompt: object, texts: Sequence[str]) -> list[float]:
    return [text.count("c") - 0.7 * text.count("b") + 0.1 * len(text) for text in texts]


def greedy_args(engine: FakeEngine, weight: float, candidates: int, max_tokens: int) -> list[int]:
    """The paper's algorithm as it stands: one candidate, one call of the reward, at a time."""
    tokens: list[int] = []
    while len(tokens) < max_tokens and (not tokens or tokens[-1] != 0):
        logits = engine._w @ engine._z[tokens[-1] if tokens else 1]
        best, chosen = -np.inf, -1
        for token in np.argsort(-logits)[:candidates].tolist():
            text = engine.text(np.array([*tokens, token], np.int32))
            score = float(logits[token]) + weight * letters("", [text])[0]
            if score > best:
                best, chosen = score, token
        tokens.append(chosen)
    return tokens


@pytest.mark.parametrize("weight, candidates", [(0.0, 4), (1.0, 1), (1.5, 4), (-2.0, 12), (3.0, 100)])
def test_greedy_args_is_the_algorithm(weight: float, candidates: int) -> None:
    engine = FakeEngine(seed=2)
    result = Aligner(engine, FakeReward(letters)).generate(
        "p", method="args", budget=2, n=2, max_tokens=9, weight=weight, candidates=candidates, temperature=0.0
    )
    expected = engine.text(np.array(greedy_args(engine, weight, candidates, 9), np.int32))
    assert [c.text for c in result.candidates] == [expected] * 2
    steps = sum(c.n_tokens for c in result.candidates)
    assert result.iterations[0].n_scored == steps * min(candidates, 12) + 2


def test_stochastic_args_samples_the_scores() -> None:
    engine = FakeEngine(d=4, vocabulary=5, seed=1)
    logits = engine._w @ engine._z[1]
    found = np.argsort(-logits)[:3]
    texts = [engine.text(np.array([token], np.int32)) for token in found]
    scores = (logits[found] + 1.2 * np.array(letters("", texts))) / 0.8
    law = np.exp(log_softmax(scores.astype(np.float64)))
    result = Aligner(engine, FakeReward(letters)).generate(
        "p", method="args", budget=4000, n=500, max_tokens=1, weight=1.2, candidates=3, temperature=0.8
    )
    for text, p in zip(texts, law, strict=True):
        share = np.mean([c.text == text for c in result.candidates])
        assert share == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 4000) + 1e-3)


def test_args_leaves_out_what_has_no_score() -> None:
    def odd(prompt: object, texts: Sequence[str]) -> list[float]:
        return [float("nan") if text.endswith("c") else 0.0 for text in texts]

    result = Aligner(FakeEngine(), FakeReward(odd)).generate(
        "p", method="args", budget=8, n=8, max_tokens=6, temperature=2.0, candidates=4
    )
    assert all("c" not in c.text for c in result.candidates)
    nothing = FakeReward(lambda prompt, texts: [float("nan") if len(t) < 3 else 1.0 for t in texts])
    assert Aligner(FakeEngine(), nothing).generate("p", method="args", budget=4, n=4, max_tokens=6).reward == 1.0


def test_a_reward_that_raises_ends_its_own_search_alone() -> None:
    def fails(prompt: object, texts: Sequence[str]) -> list[float]:
        if prompt == "bad":
            raise ValueError("no")
        return [float(len(text)) for text in texts]

    aligner = Aligner(FakeEngine(), FakeReward(fails))
    bad, good = aligner.generate_many(["bad", "good"], method="args", budget=2, n=2, max_tokens=4)
    assert isinstance(good, Result) and not isinstance(bad, Result) and "no" in str(bad)


def test_args_needs_scores_of_beginnings() -> None:
    reward = FakeReward(letters)
    setattr(reward, "unfinished", False)  # noqa: B010
    with pytest.raises(InputError, match="scores of unfinished responses"):
        Aligner(FakeEngine(), reward).generate("p", method="args", budget=2)


@pytest.mark.native
def test_args_on_the_shipped_model_raises_the_reward() -> None:
    with Aligner.load() as aligner:
        options: dict[str, Any] = {"n": 2, "budget": 2, "max_tokens": 12, "seed": 1}
        plain = aligner.generate(CHAT, method="args", weight=0.0, temperature=0.0, **options)
        aligned = aligner.generate(CHAT, method="args", weight=4.0, temperature=0.0, **options)
        assert aligned.reward > plain.reward and aligned.iterations[0].n_scored > 2 * 12 * 9
        kl = aligner.generate(CHAT, method="args", weight=4.0, temperature=1.0, kl=True, **options)
        assert all(c.kl is not None and c.kl > 0 for c in kl.candidates)


# RE-Control


def network(d: int, hidden: int = 7, seed: int = 0) -> Value:
    rng = np.random.default_rng(seed)
    a, b, w, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((hidden, d), (hidden,), (hidden,), (1,)))
    return Value(a, b, w, c)


def test_gradients_are_those_of_the_value() -> None:
    value, rng = network(5), np.random.default_rng(1)
    z = rng.standard_normal((4, 5)).astype(np.float64)
    step = 1e-3
    for i in range(5):
        moved = np.zeros(5)
        moved[i] = step
        slope = (value(z + moved) - value(z - moved)) / (2 * step)
        np.testing.assert_allclose(value.gradient(z)[:, i], slope, atol=2e-3)


def test_a_value_function_is_kept_without_code(tmp_path: Path) -> None:
    value = network(5)
    value.save(tmp_path / "v.safetensors")
    again = Value.load(tmp_path / "v.safetensors")
    z = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    np.testing.assert_array_equal(value(z), again(z))
    (tmp_path / "bad").write_bytes(b"\x80\x04not safetensors")
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((2, 2), np.float32)}, tmp_path / "part.safetensors")
    for bad, message in (
        ("bad", "bad is no value function"),
        ("none", "cannot be read"),
        ("part.safetensors", "b is missing"),
    ):
        with pytest.raises(InputError, match=message):
            Value.load(tmp_path / bad)
    with pytest.raises(InputError, match="found"):
        Value(np.zeros((2, 3)), np.zeros(3), np.zeros(2), np.zeros(1))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(shipped.model()) as made:
        yield made


@pytest.mark.native
@pytest.mark.parametrize("steps", [0, 3])
def test_every_step_is_decoded_from_the_moved_pre_logits(engine: LlamaEngine, steps: int) -> None:
    """Greedy tokens are the likeliest of ``W z'``, z' by the reference's own loop; its KL is the moved law's."""
    value = network(engine.d, 16)
    controller = create(
        "re-control", d=engine.d, max_tokens=12, seed=0, head=lambda: engine.head, value=value, rate=0.5, steps=steps,
        temperature=0.0, min_p=0.0,
    )  # fmt: skip
    rollouts = engine.rollout(
        CHAT, controller.ask(3), max_tokens=12, seeds=RowSeeds(0), want=frozenset({"prelogits", "kl"})
    )
    assert rollouts.prelogits is not None and rollouts.kl is not None
    weight = engine.head.weight.astype(np.float64)
    for row, tokens in enumerate(rollouts.tokens):
        kl = 0.0
        for z, token in zip(rollouts.prelogits[row].astype(np.float64), tokens, strict=True):
            moved = z.copy()
            for _ in range(steps):
                on = value.a.astype(np.float64) @ moved + value.b > 0
                moved += 0.5 * value.a.T.astype(np.float64) @ (on * value.w)
            logits, base = weight @ moved, weight @ z
            assert logits[token] > logits.max() - 0.06
            p, q = log_softmax(logits), log_softmax(base)
            kl += float((np.exp(p) * (p - q)).sum())
        assert rollouts.kl[row] == pytest.approx(kl, rel=0.05, abs=0.02)
    base = engine.rollout(CHAT, Controls(1), max_tokens=12, seeds=RowSeeds(0))
    same = [np.array_equal(tokens, base.tokens[0]) for tokens in rollouts.tokens]
    assert same == [steps == 0] * 3


@pytest.mark.native
def test_rows_with_and_without_a_processor_share_steps(engine: LlamaEngine) -> None:
    """A job with one beside a job without: each gets what it gets alone."""

    class Shift:
        needs_prelogits = False

        def __call__(self, step: Step) -> FloatArray:
            logits = step.logits.copy()
            logits[:, 100:] -= 1e9
            assert all(len(tokens) < 10 for tokens in step.tokens) and len(step.rows) == len(logits)
            return logits

    warm = Sampling(0.8)
    alone = engine.rollout(CHAT, Controls(2, sampling=warm, processor=Shift()), max_tokens=10, seeds=RowSeeds(1))
    assert all((tokens < 100).all() for tokens in alone.tokens)
    plain = engine.rollout(CHAT, Controls(2, sampling=warm), max_tokens=10, seeds=RowSeeds(1))
    from aisp_local.engine.base import Job

    jobs = [
        Job(CHAT, Controls(2, sampling=warm, processor=Shift()), 10, RowSeeds(1)),
        Job(CHAT, Controls(2, sampling=warm), 10, RowSeeds(1)),
    ]
    done: dict[int, Any] = {}

    class Feed:
        def __init__(self) -> None:
            self.waiting = list(jobs)

        def next(self, idle: bool) -> Job | None:
            return self.waiting.pop(0) if self.waiting else None

        def stop(self) -> bool:
            return False

        def stepped(self, *_: object) -> None: ...

        def ended(self, *_: object) -> None: ...

        def finished(self, job: Job, rollouts: Any) -> None:
            done[id(job)] = rollouts

    engine.run(Feed(), prompts=[CHAT, CHAT], n=4, max_tokens=10)
    for job, expected in zip(jobs, (alone, plain), strict=True):
        assert [t.tolist() for t in done[id(job)].tokens] == [t.tolist() for t in expected.tokens]


def test_re_control_says_what_it_lacks() -> None:
    engine = FakeEngine()
    with pytest.raises(InputError, match="needs a value function"):
        create("re-control", d=8, max_tokens=4, seed=0, head=lambda: engine.head)
    with pytest.raises(InputError, match="5 wide; the model's are 8"):
        create("re-control", d=8, max_tokens=4, seed=0, head=lambda: engine.head, value=network(5))
    with pytest.raises(InputError, match="cannot be read"):
        create("re-control", d=8, max_tokens=4, seed=0, value="none.safetensors")
    assert isinstance(create("re-control", d=8, max_tokens=4, seed=0), ReControl)


def test_a_trained_value_function_knows_the_reward(tmp_path: Path) -> None:
    """Responses whose reward is written in their states: learnt, and following it raises the reward."""
    pytest.importorskip("torch", reason="training a value function needs torch")
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(6)
    states, rewards = [], []
    for _ in range(300):
        aim = rng.standard_normal()
        z = rng.standard_normal((int(rng.integers(4, 12)), 6)) * 0.3 + aim * direction
        states.append(z.astype(np.float32))
        rewards.append(5.0 + 2.0 * aim)
    value, figures = training.train(training.Episodes(states, np.array(rewards)), epochs=60)
    assert figures["last"] > 0.75 and figures["held_out"] == 30
    gradient = value.gradient(np.zeros((1, 6), np.float32))[0]
    assert gradient @ direction / (np.linalg.norm(gradient) * np.linalg.norm(direction)) > 0.7


def test_rewards_that_do_not_vary_train_a_value_function_that_knows_nothing() -> None:
    pytest.importorskip("torch", reason="training a value function needs torch")
    states = [np.random.default_rng(i).standard_normal((4, 3)).astype(np.float32) for i in range(40)]
    value, figures = training.train(training.Episodes(states, np.full(40, -2.0)), epochs=2)
    assert np.isnan(figures["last"]) and np.isfinite(value(states[0])).all()


@pytest.mark.native
def test_the_commands(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training a value function needs torch")
    out = tmp_path / "v.safetensors"
    small = ["--responses", "4", "--max-tokens", "12", "--epochs", "2", "--threads", "1", "-o", str(out)]
    done = CliRunner().invoke(main, ["bench", "value", *small])
    assert done.exit_code == 0 and "correlation with the reward" in done.output
    short = ["generate", "Tell me a story.", "--method", "re-control", "--budget", "2", "--max-tokens", "8"]
    done = CliRunner().invoke(main, [*short, "--option", f"value={out}", "--option", "steps=2"])
    assert done.exit_code == 0 and done.output.strip()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("blocks", "is not of the form NAME=VALUE"),
        ("=3", "is not of the form NAME=VALUE"),
        ("seed=3", "has no option 'seed'; its options are blocks, commit"),
        ("nats=abc", "nats is 'abc'; it must be a number"),
        ("blocks=many", "blocks is 'many'; it must be a whole number"),
        ("temperature=true", "temperature is True; it must be a number"),
        ("commit=maybe", "commit is 'maybe'; it must be true or false"),
        ("steering=[1]", "has no option 'steering'"),
        ("blocks=0", "blocks is 0"),
    ],
)
def test_options_of_methods_are_checked(option: str, message: str) -> None:
    done = CliRunner().invoke(main, ["generate", "p", "--option", option])
    assert done.exit_code == 2 and message in done.output


def test_scores_are_of_the_prompt_asked() -> None:
    """``score`` of ARGS is the reward for this prompt."""
    seen: set[object] = set()

    def note(prompt: object, texts: Sequence[str]) -> list[float]:
        seen.add(prompt)
        return [0.0] * len(texts)

    Aligner(FakeEngine(), FakeReward(note)).generate_many(["a", "b"], method="args", budget=1, max_tokens=2)
    assert seen == {"a", "b"}
    assert call("r", note, "c", ["x"]).tolist() == [0.0]
