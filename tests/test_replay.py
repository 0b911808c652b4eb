"""Searches that are written down and run again: the real engine, the shipped models, the command."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from click.testing import CliRunner, Result

from aisp_local import Aligner, InputError, replay, shipped
from aisp_local.cli.main import main
from aisp_local.controllers.re_control import Value
from aisp_local.testing import FakeEngine, FakeReward
from aisp_local.trace import Trace
from aisp_local.types import Message, Progress

pytestmark = pytest.mark.native

STORY: list[Message] = [{"role": "user", "content": "Tell me a story about a fox."}]
SMALL: dict[str, Any] = {"budget": 8, "n": 4, "max_tokens": 16}


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace of a search by the command, and beside it what --json says of it."""
    folder = tmp_path_factory.mktemp("trace")
    small = ("--budget", "8", "--rows", "4", "--max-tokens", "16", "--threads", "1", "--kl")
    judged = ("--judge", "judge", "--judge-all")
    out = ("--json", "-o", folder / "out.json", "--trace", folder / "fox.json")
    done = command("generate", "Tell me a story about a fox.", *small, *judged, *out)
    assert done.exit_code == 0, done.output
    return folder / "fox.json"


@pytest.fixture(scope="module")
def aligner() -> Iterator[Aligner]:
    with Aligner.load(threads=1) as made:
        yield made


def again(aligner: Aligner, trace: Trace) -> list[str]:
    """What differs."""
    replay.check(trace, aligner)
    fields = replay.compare(trace, replay.run(trace, aligner))
    assert sum(field.values for field in fields) > 8 * len(
        trace["result"]["candidates"]
    )  # of every candidate, text and reward among them
    return [field.difference for field in fields if field.difference is not None]


def test_a_trace_holds_what_json_prints_and_what_a_second_run_needs(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["result"] == json.loads(file.with_name("out.json").read_text(encoding="utf-8"))
    schema = json.loads(resources.files("aisp_local").joinpath("trace.schema.json").read_text(encoding="utf-8"))
    jsonschema_rs.validate(schema, content)
    assert content["prompt"] == STORY and content["search"]["options"]["strength"] == 0.5
    assert content["machine"]["threads"] == 1 and content["machine"]["build"].startswith("patched")
    assert content["reward"]["source"] == content["model"]["source"] == "shipped"
    assert sorted(path.name for path in file.parent.iterdir()) == ["fox.json", "out.json"]
    # What decides a search is in its trace: a parameter that is added to generate has to be added there.
    told = {"self", "prompt", "effort", "baseline", "steering", "options"}
    beside = {"timeline", "stop", "on_progress"}
    assert set(inspect.signature(Aligner.generate).parameters) - told - beside <= set(content["search"])


def test_replay_proves_that_a_run_is_the_same(file: Path) -> None:
    done = command("replay", file)
    assert done.exit_code == 0, done.output
    assert "the run is the same" in done.stdout and "different" not in done.stdout and done.stderr == ""
    assert "8 of 8 rollouts in 2 iterations, complete" in done.stdout


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "answer": lambda found: found.update(answer="Another."),
    "candidates[5].text": lambda found: found["candidates"][5].update(text=found["candidates"][5]["text"] + "x"),
    "candidates[7].reward": lambda found: found["candidates"][7].update(reward=found["candidates"][7]["reward"] + 1e-6),
    "candidates[0].judge": lambda found: found["candidates"][0].update(judge=0.0),
    "candidates[2].kl": lambda found: found["candidates"][2].update(kl=0.5),
    "candidates[3].finish_reason": lambda found: found["candidates"][3].update(finish_reason="stop"),
    "candidates": lambda found: found["candidates"].pop(),
    "iterations[1].mean": lambda found: found["iterations"][1].update(mean=0.0),
    "baseline.reward": lambda found: found["baseline"].update(reward=0.0),
    "n_tokens": lambda found: found.update(n_tokens=1),
    "status": lambda found: found.update(status="target"),
}


def test_what_was_changed_is_found(file: Path) -> None:
    trace = Trace.load(file)
    with replay.load(trace) as aligner:
        assert replay.unlike(trace, aligner) == []
        result = replay.run(trace, aligner)
        assert all(field.difference is None for field in replay.compare(trace, result))
        for where, change in CHANGES.items():
            content = copy.deepcopy(dict(trace.content))
            change(content["result"])
            (found,) = [f.difference for f in replay.compare(Trace(content), result) if f.difference is not None]
            assert found.startswith(f"{where}: ") and found.endswith(" now"), found
        # Times are no part of it.
        content = copy.deepcopy(dict(trace.content))
        content["result"]["iterations"][0] |= {"seconds": 9.0, "decode_seconds": 9.0}
        assert all(field.difference is None for field in replay.compare(Trace(content), result))


def test_the_command_says_what_is_another(file: Path, tmp_path: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content["search"]["seed"] = 4
    content["machine"] |= {"processor": "abacus"}
    content["machine"]["versions"]["numpy"] = "0.1"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content), encoding="utf-8")
    done = command("replay", changed)
    assert done.exit_code == 1, done.output
    assert "different  answer: " in done.stdout and "fields differ" in done.stdout
    assert "processor: abacus then, " in done.stderr and "numpy 0.1 then, " in done.stderr
    done = command("replay", file, "-m", shipped.talker())
    assert done.exit_code == 2 and "is another model than the trace's (storyteller.gguf)" in done.stderr
    done = command("replay", file, "-r", shipped.talker_reward())
    assert done.exit_code == 1 and "the reward was 'story-reward'" in done.stderr


@pytest.mark.parametrize(
    "more",
    [
        {"method": "aisp"},
        {"method": "smc"},
        {"method": "misvo", "prompt_index": 3},
        {"method": "best-of-n", "n": 3, "stop_strings": ["."], "logprobs": True},
        {"target_reward": -100.0},
        {"budget_tokens": 40},
        {"grammar": 'root ::= " upon" [a-z ]+ "."'},
        {"commit": True, "strength": 0.8, "seed": 7},
    ],
    ids=str,
)
def test_whatever_was_asked(aligner: Aligner, tmp_path: Path, more: dict[str, Any]) -> None:
    aligner.trace(aligner.generate("Once", **(SMALL | more))).save(tmp_path / "trace.json")
    assert again(aligner, Trace.load(tmp_path / "trace.json")) == []


@pytest.mark.parametrize("steps", [2, 3, 7, *range(16, 22), 30])
def test_a_search_that_was_cut_short_repeats_to_the_decode_step(aligner: Aligner, steps: int) -> None:
    """Also between two blocks, where there is one choice more to be cut before or after."""
    reports: list[Progress] = []
    result = aligner.chat(
        STORY, **(SMALL | {"budget": 12}), stop=lambda: len(reports) >= steps, on_progress=reports.append
    )
    assert result.status == "interrupted" and result.ended_at is not None
    replayed = replay.run(trace := aligner.trace(result), aligner)
    assert replayed.ended_at == result.ended_at and replayed.status == "interrupted"
    assert [f.difference for f in replay.compare(trace, replayed) if f.difference is not None] == []


def test_a_search_that_was_broken_off(aligner: Aligner) -> None:
    def broken(at: tuple[int, int]) -> Trace:
        def progress(now: Progress) -> None:
            if now.stats is None and (now.iteration, now.step) == at:
                raise KeyboardInterrupt

        return aligner.trace(aligner.chat(STORY, **SMALL, on_progress=progress))

    between = broken((2, 2))
    assert between["result"]["ended_at"] is not None and len(between["result"]["iterations"]) == 1
    assert again(aligner, between) == []
    with pytest.raises(InputError, match="nobody knows where"):
        replay.check(broken((1, 14)), aligner)


def test_a_turn_of_a_conversation_and_a_calibrated_reward() -> None:
    """What the cache held of the prompt rounds otherwise; the parts in which it was read are in the trace."""
    messages = list(STORY)
    with Aligner.load(threads=1, reward="kind-and-safe") as first:
        for text in ("And then?", "What else?"):
            messages.append({"role": "assistant", "content": first.chat(messages, **SMALL).answer})
            messages.append({"role": "user", "content": text})
        result = first.chat(messages, **SMALL, baseline=True)
        messages.clear()  # the trace has its own
        trace = first.trace(result)
    assert len(trace["search"]["prompt_parts"]) == 3 and len(trace["prompt"]) == 5
    assert trace["result"]["calibration"]["parts"] and trace["reward"]["source"] == "kind-and-safe"
    with replay.load(trace) as second:
        assert replay.unlike(trace, second) == [] and again(second, trace) == []


def test_steering_and_adapters(tmp_path: Path) -> None:
    with Aligner.load(threads=1, loras=[shipped.adapter()]) as aligner:
        kept = aligner.steering(aligner.chat(STORY, **SMALL))
        aligner.trace(aligner.chat(STORY, **SMALL, steering=kept)).save(tmp_path / "trace.json")
    trace = Trace.load(tmp_path / "trace.json")
    assert len(trace["search"]["steering"]) == len(kept.u) and "steering" not in trace["search"]["options"]
    with replay.load(trace) as again_:
        assert again(again_, trace) == []


def test_a_batch_of_prompts_says_so(aligner: Aligner) -> None:
    results = aligner.generate_many(["One", "Two"], **SMALL)
    assert not any(isinstance(result, BaseException) for result in results)
    trace = aligner.trace(results[1])  # type: ignore[arg-type]
    assert trace["search"]["beside"] == 1 and trace["search"]["prompt_index"] == 1
    assert any("in one batch with 1 others" in sentence for sentence in replay.unlike(trace, aligner))


def test_a_batch_that_calls_share_says_so(aligner: Aligner) -> None:
    with Aligner.load(threads=1, together=3) as shared:
        trace = shared.trace(shared.generate("One", budget=2, max_tokens=4))
    assert trace["machine"]["together"] == 3
    assert any("up to 3 searches shared a batch" in sentence for sentence in replay.unlike(trace, aligner))


def test_what_no_trace_can_say() -> None:
    with Aligner(FakeEngine(), FakeReward(lambda prompt, texts: [1.0] * len(texts)), model_name="x.gguf") as fake:
        trace = fake.trace(fake.generate("a", **SMALL))
        with pytest.raises(InputError, match="does not say where the model 'x.gguf' lies; give it with -m"):
            replay.load(trace)
        with pytest.raises(InputError, match="does not say where the reward .* lies; give it with -r"):
            replay.load(trace, model=shipped.model())
        value = Value(*(FakeEngine()._w[:2], *([FakeEngine()._w[0, :k] for k in (2, 2, 1)])))
        with pytest.raises(InputError, match="'value' is an object"):
            fake.trace(fake.generate("a", method="re-control", value=value, **SMALL))
        with pytest.raises(InputError, match="does not say what was asked"):
            fake.trace(replay.compare.__globals__["Result"]("a", 1.0, "m", 1, 0, (), (), "complete", 0.0, 0))


def test_a_trace_without_folders(aligner: Aligner) -> None:
    trace = aligner.trace(aligner.generate("a", **SMALL), paths=False)
    assert str(shipped.model().parent) not in json.dumps(dict(trace.content))


RUBBISH: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not valid JSON"),
    "no JSON": (b"<html>", "is not valid JSON"),
    "no UTF-8": (b"\xff\xfe{}", "is not valid JSON in UTF-8"),
    "deep": (b"[" * 100_000, "is not valid JSON"),
    "a list": (b"[1]", "is no trace of aisp-local; write one with"),
    "another file": (b'{"traceEvents": []}', "is no trace of aisp-local"),
    "NaN": (b'{"format": "aisp-local-trace", "x": NaN}', "NaN is no number that JSON has"),
    "infinite": (b'{"format": "aisp-local-trace", "x": 1e999}', "1e999 is no number that JSON has"),
    "a lone surrogate": (b'{"format": "aisp-local-trace", "x": "\\ud800"}', "is not valid JSON in UTF-8"),
    "version": (b'{"format": "aisp-local-trace", "version": 2}', "version 2, and this aisp-local reads version 1"),
    "fields": (b'{"format": "aisp-local-trace", "version": 1}', 'is a broken trace: "created" is a required property'),
}


@pytest.mark.parametrize("name", sorted(RUBBISH))
def test_rubbish_is_one_sentence(name: str, tmp_path: Path) -> None:
    data, message = RUBBISH[name]
    path = tmp_path / "trace.json"
    path.write_bytes(data)
    for verb in ("replay", "explain"):
        done = command(verb, path)
        assert done.exit_code == 2 and message in done.stderr, done.output
        assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""
    assert [one.name for one in tmp_path.iterdir()] == ["trace.json"]


def test_where_a_trace_is_broken(file: Path, tmp_path: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content["result"]["candidates"][3]["reward"] = "high"
    (tmp_path / "trace.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"at result\.candidates\[3\]\.reward"):
        Trace.load(tmp_path / "trace.json")
    with pytest.raises(InputError, match="Is a directory"):
        Trace.load(tmp_path)
    with pytest.raises(InputError, match="larger than 256 MiB"), (tmp_path / "large").open("wb") as large:
        large.truncate(300 << 20)
        large.flush()
        Trace.load(tmp_path / "large")
    done = command("generate", "a", "--trace", tmp_path / "nowhere" / "trace.json")
    assert done.exit_code == 2 and "does not exist; create it" in done.stderr


def test_a_trace_of_the_last_answer_in_a_chat(tmp_path: Path) -> None:
    lines = f"/trace {tmp_path / 'early.json'}\nTell me a story.\n/trace\n/trace {tmp_path / 'turn.json'}\n"
    done = CliRunner().invoke(main, ["chat", "--max-tokens", "8", "--rows", "4", "--threads", "1"], input=lines)
    assert done.exit_code == 0, done.output
    assert "nothing to write yet" in done.output and "give a file: /trace" in done.output
    assert Trace.load(tmp_path / "turn.json")["prompt"][-1]["content"] == "Tell me a story."
    assert [path.name for path in tmp_path.iterdir()] == ["turn.json"]
