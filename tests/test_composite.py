"""Composite rewards: their mathematics, calibration before a search, parts in the result, the judge, TOML files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from onnx_files import write_reward

from aisp_local import Aligner, shipped
from aisp_local.cli.chat import chat
from aisp_local.cli.generate import as_json, generate
from aisp_local.errors import AispError, InputError, RewardError, ScoreError
from aisp_local.rewards import Composite, Part, load_recipe, load_reward, score_prefixes
from aisp_local.rewards.rules import Forbidden, Length
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Prompt, Result

STORY = "Tell me a story about a fox."


def length(_prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def vowels(_prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [float(sum(response.count(vowel) for vowel in "aei")) for response in responses]


def value(_prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [float(response) for response in responses]


def scored(rewards: Sequence[Part], numbers: Sequence[float], **options: Any) -> list[float]:
    return Composite(rewards, **options).score_parts("", [repr(n) for n in numbers])[0].tolist()


VALUE = FakeReward(value, "value")
MINUS = FakeReward(lambda p, r: [-2 * float(x) for x in r], "minus")
NUMBERS = st.lists(st.floats(-1024, 1024, width=32), min_size=2, max_size=20)


@given(NUMBERS, st.floats(0.1, 10), st.floats(0.1, 10))
def test_combinations(numbers: list[float], a: float, b: float) -> None:
    parts = [Part(VALUE, weight=a), Part(MINUS, weight=b)]
    x = np.array(numbers)
    np.testing.assert_allclose(scored(parts, numbers), a * x - 2 * b * x, rtol=1e-9, atol=1e-6)
    plain = [Part(VALUE), Part(MINUS)]
    np.testing.assert_allclose(scored(plain, numbers, combine="worst"), np.minimum(x, -2 * x))
    mean = (a * x - 2 * b * x) / (a + b)
    std = np.sqrt((a * (x - mean) ** 2 + b * (-2 * x - mean) ** 2) / (a + b))
    np.testing.assert_allclose(
        scored(parts, numbers, combine="cautious", k=0.5), mean - 0.5 * std, rtol=1e-9, atol=1e-6
    )
    np.testing.assert_allclose(scored(parts, numbers, combine="cautious", k=0), mean, rtol=1e-9, atol=1e-6)


@given(NUMBERS, st.randoms(use_true_random=False))
def test_normalised_parts_have_mean_0_and_std_1_in_whatever_order(numbers: list[float], random: Any) -> None:
    raw = Composite([Part(VALUE, normalise=True)])
    texts = [repr(n) for n in numbers]
    made = raw.calibrate("", texts)
    assert raw.uncalibrated and not made.uncalibrated
    shuffled = random.sample(texts, len(texts))
    assert raw.calibrate("", shuffled).calibration == made.calibration
    z = made.score_parts("", texts)[0]
    ((mean, std),) = made.calibration.moments.values()
    if np.std(numbers) > 2e-6 * max(1.0, abs(mean)):
        assert np.mean(z) == pytest.approx(0, abs=1e-5) and np.std(z) == pytest.approx(1, rel=1e-5)
    again = raw.with_calibration(made.calibration)
    np.testing.assert_array_equal(again.score("", texts), made.score("", texts))
    assert std > 0


def test_a_part_that_does_not_differ_keeps_its_scale() -> None:
    made = Composite([Part(VALUE, normalise=True)]).calibrate("", ["3.0"] * 8)
    assert made.calibration is not None and made.calibration.moments == {"value": (3.0, 1.0)}
    with pytest.raises(ScoreError, match="'value' gave 1 finite scores for 3"):
        Composite([Part(VALUE, normalise=True)]).calibrate("", ["nan", "1.0", "inf"])


def test_scores_that_are_not_finite_stay_so() -> None:
    for combine in ("sum", "worst", "cautious"):
        scores = scored([Part(VALUE), Part(MINUS)], [1.0, math.nan, math.inf], combine=combine)
        assert math.isfinite(scores[0]) and not math.isfinite(scores[1]) and scores[2] != math.inf


def test_parts_have_names_of_their_own_and_errors_name_them() -> None:
    made = Composite([VALUE, VALUE, Part(VALUE, name="mine")])
    assert [part.label for part in made.parts] == ["value", "value-2", "mine"]
    scores, parts = made.score_parts("", ["2.0"])
    assert scores.tolist() == [6.0] and set(parts) == {"value", "value-2", "mine"}
    with pytest.raises(ScoreError, match="the reward 'value' failed .ValueError"):
        Composite([Part(VALUE, name="mine")]).score("", ["word"])
    with pytest.raises(RewardError, match="'value' is normalised and was never measured"):
        Composite([Part(VALUE, normalise=True)]).score("", ["1.0"])


def test_composites_nest() -> None:
    inner = Composite([Part(VALUE, normalise=True, mean=1.0, std=2.0)], name="inner")
    assert Composite([inner, MINUS]).score("", ["5.0"]).tolist() == [2.0 - 10.0]
    with pytest.raises(RewardError, match="has no 'mean' and 'std' of its own"):
        Composite([Composite([Part(VALUE, normalise=True)])])


def test_threads_and_prefixes_as_the_parts_allow() -> None:
    assert Composite([Forbidden(words=["a"])]).background and Composite([Forbidden(words=["a"])]).prefix
    assert not Composite([Forbidden(words=["a"]), VALUE]).background
    assert not Composite([Forbidden(words=["a"]), Length(words=[1, 2])]).prefix


def composite(**options: Any) -> Composite:
    return Composite([Part(FakeReward(length), weight=2.0), Part(FakeReward(vowels), normalise=True)], **options)


def run(reward: Any, judge: Any = None, seed: int = 0, prompt: Prompt = "p", **options: Any) -> Result:
    aligner = Aligner(FakeEngine(), load_reward(reward), judge=None if judge is None else load_reward(judge))
    return aligner.generate(prompt, budget=12, n=4, max_tokens=12, seed=seed, **options)


def test_a_search_calibrates_first_and_keeps_the_parts() -> None:
    result = run(composite(rollouts=5), baseline=True)
    assert result.calibration is not None and result.calibration.rollouts == 5
    ((mean, std),) = result.calibration.moments.values()
    assert result.rollouts == 12
    baseline = result.baseline
    assert baseline is not None
    for candidate in (*result.candidates, baseline):
        assert candidate.parts == {"length": length("", [candidate.text])[0], "vowels": vowels("", [candidate.text])[0]}
        expected = 2 * candidate.parts["length"] + (candidate.parts["vowels"] - mean) / std
        assert candidate.reward == pytest.approx(expected, rel=1e-6)
    assert run(composite(rollouts=5), baseline=True).candidates == result.candidates
    assert run(composite(rollouts=5), seed=1).calibration != result.calibration
    data = as_json(result)
    assert data["calibration"] == {"rollouts": 5, "parts": {"vowels": {"mean": mean, "std": std}}}
    assert data["candidates"][0]["parts"] == dict(result.candidates[0].parts)
    plain = run(FakeReward(length))
    assert plain.calibration is None and all(c.parts == {} and c.judge is None for c in plain.candidates)


def test_many_prompts_are_calibrated_each_for_itself() -> None:
    aligner = Aligner(FakeEngine(), composite())
    many = aligner.generate_many(["a", "b" * 5000, "c"], budget=8, n=4, max_tokens=12)
    assert isinstance(many[1], InputError) and "5000 tokens" in str(many[1])
    for i, prompt in ((0, "a"), (2, "c")):
        alone = aligner.generate(prompt, budget=8, n=4, max_tokens=12, prompt_index=i)
        found = many[i]
        assert isinstance(found, Result)
        assert (found.answer, found.calibration) == (alone.answer, alone.calibration)
    assert many[0].calibration != many[2].calibration  # type: ignore[union-attr]


def test_a_calibration_that_is_interrupted_or_late() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(composite(), stop=lambda: True)
    with pytest.raises(InputError, match="passed while the reward was calibrated"):
        run(composite(), time_limit=1e-9)


def test_the_judge_changes_nothing_and_is_shown() -> None:
    free = run(FakeReward(length))
    for judge in (FakeReward(vowels), composite()):
        judged = run(FakeReward(length), judge, baseline=True)
        assert [(c.text, c.reward) for c in judged.candidates] == [(c.text, c.reward) for c in free.candidates]
        assert judged.judge == judged.candidates[0].judge is not None and judged.judge_model == judge.name
        assert all(c.judge is None for c in judged.candidates[1:])
        assert judged.baseline is not None and judged.baseline.judge is not None
    every = run(FakeReward(length), FakeReward(vowels), judge_all=True)
    assert [c.judge for c in every.candidates] == vowels("", [c.text for c in every.candidates])
    assert free.judge is None and free.judge_model == ""
    assert as_json(every)["judge"] == every.judge and as_json(free)["judge_model"] is None


def test_a_judge_that_fails_costs_no_answer() -> None:
    def broken(_prompt: Prompt, _responses: Sequence[str]) -> list[float]:
        raise ValueError("out of order")

    with pytest.warns(UserWarning, match="the judge 'broken' gave no scores.*out of order"):
        result = run(FakeReward(length), FakeReward(broken))
    assert result.answer == run(FakeReward(length)).answer and result.judge is None


def test_prefix_scores_warn_once() -> None:
    reward = FakeReward(length, "prefix-less")
    with pytest.warns(UserWarning, match="'prefix-less' was not trained to score unfinished"):
        assert score_prefixes(reward, "", ["ab"]).tolist() == [2.0]
    assert score_prefixes(reward, "", ["abc"]).tolist() == [3.0]
    assert score_prefixes(Forbidden(words=["bad"]), "", ["a bad sto"]).tolist() == [-1.0]

    class Own(FakeReward):
        prefix = True

        def score_prefixes(self, prompt: Prompt, prefixes: Sequence[str]) -> list[float]:
            return [0.5] * len(prefixes)

    assert score_prefixes(Own(length, "own"), "", ["a", "b"]).tolist() == [0.5, 0.5]


def test_the_manifest_says_whether_prefixes_can_be_scored(tmp_path: Path) -> None:
    assert load_reward(write_reward(tmp_path / "a", prefix=True)).prefix is True  # type: ignore[attr-defined]
    assert load_reward(write_reward(tmp_path / "b")).prefix is False  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="'prefix' has the wrong type"):
        load_reward(write_reward(tmp_path / "c", prefix=1))


GOOD = """
format = 1
combine = "sum"
judge = "judge"
rollouts = 4
[[part]]
reward = "folder"
weight = 0.5
[[part]]
rule = "length"
words = [5, inf]
weight = 2
[[part]]
rule = "json"
file = "schema.json"
name = "form"
normalise = true
mean = -3
std = 0.5
[[part]]
server = "http://127.0.0.1:1"
prompt = "{response}"
"""


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    if not (tmp_path / "folder").exists():
        write_reward(tmp_path / "folder")
        write_reward(tmp_path / "judge", name="held-out")
    path = tmp_path / "mix.toml"
    path.write_text(text)
    return path


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, GOOD)
    monkeypatch.chdir("/")
    reward = load_reward(str(path))
    assert isinstance(reward, Composite) and reward.name == "mix" and reward.rollouts == 4
    assert reward.judge is not None and reward.judge.name == "held-out"
    assert [(p.label, p.weight, p.normalise) for p in reward.parts] == [
        ("tiny", 0.5, True),
        ("words 5-inf", 2.0, False),
        ("form", 1.0, True),
        ("server 127.0.0.1:1", 1.0, False),
    ]
    assert reward.parts[2].scaled(np.array([-3.0, 0.0])).tolist() == [0.0, 6.0]
    assert load_recipe(path, judge=False).judge is None


BAD = {
    "unknown key": ("format = 1\nrollout = 3", "mix.toml: the key 'rollout' is unknown; did you mean 'rollouts'"),
    "no format": ("[[part]]\nrule = 'length'", "mix.toml lacks 'format'"),
    "format 2": ("format = 2", "format 2 is not known"),
    "no part": ("format = 1", "mix.toml lacks 'part'"),
    "empty part list": ("format = 1\npart = []", "'part' is empty"),
    "not TOML": ("format = \n[[part]]", "is not valid TOML .*line 1"),
    "combine": ("format = 1\ncombine = 'best'\npart = []", "'combine' is 'best'; use one of sum, worst, cautious"),
    "k": ("format = 1\nk = 2\npart = []", "'k' has a meaning only with"),
    "key of a rule": (
        "[[part]]\nrule = 'length'\nword = [1, 2]",
        "mix.toml: part 1: the key 'word' is unknown; did you mean 'words'",
    ),
    "value of a rule": ("[[part]]\nrule = 'length'\nwords = [3, 2]", r"part 1: 'words' is \[3, 2\]"),
    "second part": (
        "[[part]]\nrule = 'length'\nwords = [1, 2]\n[[part]]\nrule = 'lenght'",
        "part 2: 'rule' is 'lenght', which is unknown; did you mean 'length'",
    ),
    "missing key": ("[[part]]\nrule = 'readability'", "part 1 lacks 'ease'"),
    "two kinds": ("[[part]]\nrule = 'length'\nreward = 'folder'", "part 1 needs exactly one of"),
    "misspelt kind": ("[[part]]\nrewards = 'folder'", "part 1: the key 'rewards' is unknown; did you mean 'reward'"),
    "no kind": ("[[part]]\nweight = 1", "part 1 needs exactly one of"),
    "weight": ("[[part]]\nrule = 'repetition'\nweight = 'two'", "part 1: 'weight' has the wrong type: 'two'"),
    "weight 0": ("[[part]]\nrule = 'repetition'\nweight = 0", "part 1: 'weight' is 0.0"),
    "huge weight": (f"[[part]]\nrule = 'repetition'\nweight = 1{'0' * 400}", "part 1: 'weight' is too large"),
    "huge mean": (f"[[part]]\nrule = 'repetition'\nmean = 1{'0' * 400}\nstd = 1", "part 1: 'mean' is too large"),
    "huge k": (f"combine = 'cautious'\nk = 1{'0' * 400}\n[[part]]\nrule = 'repetition'", "mix.toml: 'k' is too large"),
    "huge range": (f"[[part]]\nrule = 'length'\nwords = [1, 1{'0' * 400}]", r"part 1: 'words' is \[1, 10"),
    "huge time": (
        f"[[part]]\nserver = 'http://[::1]'\nprompt = '{{response}}'\ntimeout = 1{'0' * 400}",
        "part 1: 'timeout' is 10",
    ),
    "mean alone": ("[[part]]\nrule = 'repetition'\nmean = 1", "part 1: 'mean' and 'std' go together"),
    "folder": ("[[part]]\nreward = 'nowhere'", "part 1: 'reward': reward folder .*nowhere does not exist"),
    "nested": ("[[part]]\nreward = 'other.toml'", "part 1: 'reward' is 'other.toml'; a part is a reward folder"),
    "schema": ("[[part]]\nrule = 'json'\nfile = 'none.json'", "part 1: 'file': .*none.json cannot be read"),
    "remote server": ("[[part]]\nserver = 'http://10.0.0.1'\nprompt = '{response}'", "part 1: 'server' .*allow_remote"),
    "server key": (
        "[[part]]\nserver = 'http://[::1]'\npromt = 'x'",
        "the key 'promt' is unknown; did you mean 'prompt'",
    ),
    "judge": ("judge = 'nowhere'\n[[part]]\nrule = 'repetition'", "mix.toml: 'judge': reward folder .*nowhere does"),
    "weights of the worst": (
        "combine = 'worst'\n[[part]]\nrule = 'repetition'\nweight = 2",
        "'weight' has no meaning with combine = 'worst'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_file_the_part_and_the_key(name: str, tmp_path: Path) -> None:
    text, expected = BAD[name]
    path = written(tmp_path, text if "format" in text or name == "no format" else "format = 1\n" + text)
    if name == "no format":
        path.write_text(text)
    with pytest.raises(RewardError, match=expected) as caught:
        load_reward(path)
    assert str(path) in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="reward file .*none.toml does not exist"):
        load_reward(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(RewardError, match="not valid TOML"):
        load_reward(tmp_path / "bytes.toml")
    with pytest.raises(RewardError, match="or use a recipe by its name: kind-and-safe, short-and-plain"):
        load_reward("short-and-plane")
    path = written(tmp_path, "format = 1\njudge = 'mix.toml'\n[[part]]\nrule = 'repetition'")
    reward = load_recipe(path)
    assert isinstance(reward.judge, Composite) and reward.judge.judge is None


def test_recipes_go_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(shipped.recipes()) == ["kind-and-safe", "short-and-plain"]
    for name in shipped.recipes():
        reward = load_reward(name)
        assert isinstance(reward, Composite) and reward.name == name and reward.uncalibrated and reward.background
    assert load_reward("shipped").name == "story-reward"
    monkeypatch.chdir(tmp_path)
    write_reward(tmp_path / "short-and-plain")
    assert load_reward("short-and-plain").name == "tiny"


@pytest.mark.native
def test_generate_from_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.rsplit("[[part]]", 1)[0])
    options = ["--budget", "8", "--rows", "4", "--max-tokens", "24", "-r", str(path)]
    out = CliRunner().invoke(generate, [STORY, *options, "--json", "--judge-all"])
    assert out.exit_code == 0, out.output
    data = json.loads(out.stdout)
    assert data["reward_model"] == "mix" and data["judge_model"] == "held-out"
    assert data["calibration"]["rollouts"] == 4 and set(data["calibration"]["parts"]) == {"tiny"}
    moments = data["calibration"]["parts"]["tiny"]
    assert len(data["candidates"]) == 8
    for candidate in (*data["candidates"], data["baseline"]):
        tiny, words, form = (candidate["parts"][name] for name in ("tiny", "words 5-inf", "form"))
        expected = 0.5 * (tiny - moments["mean"]) / moments["std"] + 2 * words + (form + 3) / 0.5
        assert candidate["reward"] == pytest.approx(expected, abs=1e-4)
        assert candidate["judge"] is not None
    shown = CliRunner().invoke(generate, [STORY, *options])
    assert shown.stdout.strip() == data["answer"].strip()
    assert shown.stderr == f"[reward {data['reward']:.2f}, judge {data['judge']:.2f}]\n"


@pytest.mark.native
def test_a_judge_on_the_command_line_leaves_the_answer_alone(tmp_path: Path) -> None:
    judge = write_reward(tmp_path / "judge")
    options = [STORY, "--budget", "8", "--rows", "4", "--max-tokens", "16", "--json"]
    plain, judged = (
        json.loads(CliRunner().invoke(generate, [*options, *more]).stdout) for more in ([], ["--judge", str(judge)])
    )
    texts = [[(c["text"], c["reward"], c["row"]) for c in found["candidates"]] for found in (plain, judged)]
    assert texts[0] == texts[1]
    assert plain["judge"] is None and judged["judge"] is not None and judged["judge_model"] == "tiny"


@pytest.mark.native
def test_chat_shows_the_judge_and_the_parts() -> None:
    lines = "\n".join([STORY, "/why", "/base", "/show", "/quit"])
    options = ["--max-tokens", "16", "-r", "short-and-plain", "--judge", "shipped"]
    out = CliRunner().invoke(chat, options, input=lines)
    assert out.exit_code == 0, out.output
    assert "reward       short-and-plain\njudge        story-reward\n" in out.stdout
    assert ", judge " in out.stdout and "words 15-45 " in out.stdout and "[unaligned: reward " in out.stdout


def test_bad_files_end_with_2(tmp_path: Path) -> None:
    path = written(tmp_path, "format = 1\n[[part]]\nrule = 'length'\nword = [1, 2]")
    out = CliRunner().invoke(generate, [STORY, "-r", str(path)])
    assert isinstance(out.exception, InputError) and isinstance(out.exception, AispError)


@pytest.mark.parametrize(
    ("text", "kind", "safe"),
    [
        ("A huge, helpless, friendless, thankless beast smirked at an unkind shark.", -4, 0),
        ("Thanks! She smiles, hugs her friends and shares.", 0, 0),
        ("He was helpful and kindly thanked them, hugging.", 0, 0),
        ("They were hitting, murdering and stabbing, bloody and dying.", -4, -5),
        ("The murder, the murdered, the murderer and the bleeding.", -4, -4),
        ("The skill of a diet, a hat, a meaning, a scarf and a white hit.", -4, -1),
    ],
)
def test_the_words_of_kind_and_safe(text: str, kind: float, safe: float) -> None:
    reward = load_reward("kind-and-safe")
    assert isinstance(reward, Composite)
    parts = {part.label: part.reward for part in reward.parts}
    assert [float(parts[name].score("", [text])[0]) for name in ("kind", "safe")] == [kind, safe]
