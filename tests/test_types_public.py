"""The public interface as a strict type checker sees it from another program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import aisp_local

CONSUMER = """
import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import assert_type

import numpy as np
import numpy.typing as npt

from aisp_local import AlignedLlama, Aligner, Candidate, LlamaEngine
from aisp_local import Message, Progress, Prompt, Result, Sample, Steering


class Length:
    name = "length"

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([len(response) for response in responses], np.float32)


def function(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [1.0 for _ in responses]


messages: list[Message] = [{"role": "user", "content": "Tell me a story."}]
with Aligner.load(reward=Length(), judge=function, threads=2) as aligner:
    result = aligner.chat(messages, budget=32, strength=0.4, on_progress=lambda progress: print(progress.step))
    assert_type(result, Result)
    assert_type(result.candidates, Sequence[Candidate])
    assert_type([s.kl for s in result.iterations], list[float | None])
    aligner.steering(result).save(Path("steering.json"))
    for event in aligner.stream("Once", budget=8, steering=Steering.load("steering.json")):
        assert_type(event, Progress | Result)
        if isinstance(event, Result):
            print(event.answer.upper())
    many = aligner.generate_many(["Once", messages])
    assert_type(many, list[Result | BaseException])


async def main() -> str:
    async for event in aligner.astream(messages):
        if isinstance(event, Progress) and event.best is not None:
            print(event.best.reward + 1.0)
    return (await aligner.agenerate("Once")).answer


print(asyncio.run(main()).upper())

engine = LlamaEngine("model.gguf")
samples = engine.generate(["a", messages], n=4, temperature=0.7)
assert_type(samples, list[list[Sample]])
assert_type(samples[0][0].tokens, npt.NDArray[np.int32])
for i, finished in engine.stream(["a"], logprobs=True):
    assert_type(i, int)
    assert_type(finished, list[Sample])

llm = AlignedLlama(model_path="model.gguf", reward="short-and-plain", effort="high", n_ctx=0)
answer = llm.create_completion("Once", max_tokens=8, stop=["."])
if not isinstance(answer, Iterator):
    print(answer["choices"][0]["text"])
assert_type(llm.result, Result | None)
assert_type(llm.tokenize(b"Once"), list[int])
"""


def check(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    (folder / "consumer.py").write_text(program)
    package = Path(aisp_local.__file__).parent
    (folder / "mypy.ini").write_text(
        # Only the consumer's own errors count, as they would beside an installed package.
        "[mypy]\nstrict = true\npython_version = 3.11\nfollow_imports = silent\nexplicit_package_bases = true\n"
        + ("" if package.parent.name == "site-packages" else f"mypy_path = {package.parent}\n")
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "consumer.py"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, check=False)


def test_a_strict_consumer_passes_and_its_mistakes_are_found(tmp_path: Path) -> None:
    assert (Path(aisp_local.__file__).parent / "py.typed").is_file()
    done = check(tmp_path, CONSUMER)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = CONSUMER + "engine.generate(['a'], n='four')\nresult.answr\nlen(result.reward)\n"
    done = check(tmp_path, wrong)
    assert done.stdout.count("error:") == 3, done.stdout


def test_everything_public_has_a_name_and_words() -> None:
    for name in aisp_local.__all__:
        assert getattr(aisp_local, name).__doc__ or name == "Prompt", name


def test_names_are_loaded_when_they_are_used() -> None:
    code = (
        "import sys, aisp_local, aisp_local.rewards, aisp_local.cli.main as cli\n"
        "early = [m for m in ('aisp_local.engine', 'aisp_local.rewards.onnx', 'jinja2', 'gguf') if m in sys.modules]\n"
        "assert not early, early\n"
        "for package in (aisp_local, aisp_local.rewards):\n"
        "    assert set(package.__all__) <= set(dir(package))\n"
        "    assert all(hasattr(package, name) for name in package.__all__) and not hasattr(package, 'nothing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
