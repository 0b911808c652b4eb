"""What a search learnt, kept in a file and started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from test_cli import STORY, aisp

from aisp_local import Aligner, shipped
from aisp_local.engine.head import fingerprint
from aisp_local.errors import InputError
from aisp_local.steering import Steering
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.types import Result


def vowels(prompt: Any, responses: Any) -> list[float]:
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


def find(aligner: Aligner, **options: Any) -> Result:
    common: dict[str, Any] = {"budget": 16, "n": 16, "max_tokens": 30, "temperature": 2.0, "min_p": 0.0}
    return aligner.generate("p", **(common | options))


def test_a_search_starts_where_another_ended(tmp_path: Path) -> None:
    aligner = Aligner(FakeEngine(vocabulary=30), FakeReward(vowels))
    learnt = aligner.steering(find(aligner, budget=64))
    learnt.save(tmp_path / "u.json")
    again = Steering.load(tmp_path / "u.json")
    np.testing.assert_allclose(again.u, learnt.u, atol=1e-6)
    assert (again.model, again.reward) == (aligner.engine.fingerprint, "vowels")
    assert again.nats == learnt.nats is not None and 0 < again.nats <= 10.0
    less = find(aligner, steering=again, nats=1.0)
    assert less.asked["options"]["steering_nats"] == again.nats and (less.iterations[0].kl or 0.0) < 1.3
    means = [
        np.mean([find(aligner, seed=seed, **options).iterations[0].mean for seed in range(6)])
        for options in ({"steering": tmp_path / "u.json", "selection": 0.0}, {"selection": 0.0})
    ]
    assert means[0] > means[1]
    for none in ({"strength": 0.0}, {"selection": 1.0}):
        with pytest.raises(InputError, match="leave the steering out"):
            find(aligner, steering=again, **none)


def test_another_model_and_other_methods_refuse_it(tmp_path: Path) -> None:
    aligner, other = (Aligner(FakeEngine(seed=seed), FakeReward(vowels)) for seed in (0, 1))
    learnt = aligner.steering(find(aligner))
    with pytest.raises(InputError, match="learnt with another model"):
        find(other, steering=learnt)
    learnt.save(tmp_path / "u.json")
    with pytest.raises(InputError, match=r"u\.json was learnt with another model"):
        find(other, steering=tmp_path / "u.json")
    with pytest.raises(InputError, match="has no option 'steering'"):
        aligner.generate("p", method="best-of-n", budget=4, n=4, max_tokens=4, steering=learnt)
    with pytest.raises(InputError, match="holds no control"):
        aligner.steering(aligner.generate("p", method="best-of-n", budget=4, n=4, max_tokens=4))
    with pytest.raises(InputError, match=r"the shape \(3,\)"):
        find(aligner, steering=Steering(np.zeros(3, np.float32), aligner.engine.fingerprint))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 1, "model": "m", "u": [1, NaN]}', '{"format": 1, "model": "m", "u": [1, "a"]}',
     '{"format": 2, "model": "m", "u": [1]}', '{"format": 1, "model": 3, "u": [1]}', '{"format": 1, "u": 1e999}',
     '{"format": 1, "model": "m", "u": [1' + "0" * 400 + "]}", '{"format": 1, "model": "m", "u": [1], "nats": -1}',
     '{"format": 1, "model": "m", "u": [1], "nats": "1"}'],
)  # fmt: skip
def test_files_that_are_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "u.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"u\.json"):
        Steering.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Steering.load(tmp_path / "missing.json")


def test_a_fingerprint_is_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = shipped.model().read_bytes()
    path.write_bytes(data)
    assert fingerprint(path) == fingerprint(shipped.model())
    at = len(data) - 1000
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert fingerprint(path) != fingerprint(shipped.model())


@pytest.mark.native
def test_the_command_keeps_it(tmp_path: Path) -> None:
    short = ("generate", STORY, "--budget", "8", "--rows", "8", "--max-tokens", "24")
    out = aisp(*short, "--save-steering", "u.json", cwd=tmp_path)
    assert out.returncode == 0, out.stderr.decode()
    assert len(json.loads((tmp_path / "u.json").read_text())["u"]) > 100
    again = aisp(*short, "--steering", "u.json", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout != out.stdout
    synthetic.write(tmp_path / "other.gguf", "llama", vocab="bpe")
    other = aisp(*short, "--steering", "u.json", "-m", "other.gguf", cwd=tmp_path)
    assert other.returncode == 2 and "another model" in other.stderr.decode()
    for option, file in (("--save-steering", "v.json"), ("--steering", "u.json")):
        none = aisp(*short, "--method", "best-of-n", option, file, cwd=tmp_path)
        assert none.returncode == 2 and f"{option} needs a method that holds a control" in none.stderr.decode()
    assert not (tmp_path / "v.json").exists()
    (tmp_path / "words.toml").write_text('format = 1\n[[part]]\nrule = "length"\nwords = [1, 900]\n')
    said = aisp(*short, "--steering", "u.json", "--save-steering", "v.json", "-r", "words.toml", cwd=tmp_path)
    assert "was learnt with the reward 'story-reward', and here it is 'words'" in said.stderr.decode()
    zero = aisp(*short, "--save-steering", "v.json", "--strength", "0", cwd=tmp_path)
    assert zero.returncode == 0 and "the steering is zero" in zero.stderr.decode()
