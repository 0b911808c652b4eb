"""What becomes of llama-cpp-python's arguments: most are honoured, these are not."""

from __future__ import annotations

import inspect
import json
import random
import secrets
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from aisp_local.api import Aligner
from aisp_local.controllers import defaults_of
from aisp_local.defaults import DEFAULT_EFFORT, DEFAULT_METHOD, budget_of, check_search
from aisp_local.errors import InputError
from aisp_local.grammar import Grammar
from aisp_local.types import Message, Sampling

# With their defaults in llama-cpp-python.
_SPEED: dict[str, Any] = {
    "n_batch": 512,
    "n_threads_batch": None,
    "no_perf": False,
    "numa": False,
    "offload_kqv": True,
    "op_offload": None,
    "swa_full": None,
    "use_mlock": False,
    "use_mmap": True,
    "vocab_only": False,
}
"""They change how fast a model is loaded or decoded, not what it says: a warning says that they have no effect."""

_REFUSED: dict[str, Any] = {
    "attention_type": -1,
    "draft_model": None,
    "embedding": False,
    "kv_overrides": None,
    "lora_base": None,
    "main_gpu": 0,
    "pooling_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "rope_scaling_type": -1,
    "spm_infill": False,
    "split_mode": 1,
    "tensor_split": None,
    "type_k": None,
    "type_v": None,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_ext_factor": -1.0,
    "yarn_orig_ctx": 0,
}
"""Without them the model would say something else."""

_SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
_UNSAMPLED = {"typical_p": 1.0, "tfs_z": 1.0, "mirostat_mode": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1}
_ANY_SEED = 2**32 - 1

_OWN = {
    "grammar": "grammar or response_format",
    "logprobs": "logprobs",
    "max_tokens": "max_tokens",
    "prompt": "the prompt",
    "stop": "stop (strings)",
    "stop_strings": "stop",
}
_SEARCH = set(inspect.signature(Aligner.generate).parameters)


def alignment(more: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of the constructor's other arguments. Raises InputError for those that cannot be honoured."""
    changed = {name for name, default in (_SPEED | _REFUSED).items() if name in more and more[name] != default}
    if refused := sorted(changed & set(_REFUSED)):
        raise InputError(f"AlignedLlama has no {refused[0]}; leave it out, or use llama_cpp.Llama")
    if changed:
        warnings.warn(f"AlignedLlama goes without {', '.join(sorted(changed))}", stacklevel=3)
    align = {name: value for name, value in more.items() if name not in _SPEED and name not in _REFUSED}
    check_align(align)
    check_search(
        method=align.get("method", DEFAULT_METHOD),
        budget=budget(align),
        n=align.get("n"),
        max_tokens=1,
        seed=0,
        **{name: value for name, value in align.items() if name not in _SEARCH},
    )
    return align


def check_align(align: Mapping[str, Any]) -> None:
    """Raises InputError for options of ``Aligner.generate`` that completions have arguments of their own for."""
    for name, own in _OWN.items():
        if name in align:
            raise InputError(f"{name} is not an option of alignment here; give {own} with each completion")


def budget(align: Mapping[str, Any]) -> int:
    """Rollouts of an answer. Raises InputError for an unknown effort."""
    return budget_of(align.get("budget"), align.get("effort", DEFAULT_EFFORT))


def grammar_of(response_format: Mapping[str, Any]) -> Any:
    """The ``LlamaGrammar`` of a response format, which holds answers to all of its schema: llama-cpp-python's own
    passes over bounds of numbers and more. None where the format asks for none, or for what is left to that one."""
    from llama_cpp import LlamaGrammar

    if response_format.get("type") != "json_object":
        return None
    try:
        held = Grammar.of(response_format.get("schema") or {"type": "object"})
        return LlamaGrammar.from_string(held.gbnf, verbose=False)
    except InputError:
        return None


def check_unsampled(given: Mapping[str, Any]) -> None:
    """Raises InputError for a way of sampling that the engine does not have."""
    for name, default in _UNSAMPLED.items():
        if given[name] != default:
            raise InputError(f"{name} is {given[name]}; it is not supported, so leave it at {default}")


def plain_sampling(given: Mapping[str, Any], temperature: float) -> Sampling:
    """As llama.cpp's samplers take these values; ``temperature``: where none is given."""
    values = _SAMPLING | {"temperature": temperature} | {k: v for k, v in given.items() if v is not None}
    if values["temperature"] < 0:  # llama.cpp: the whole law
        return Sampling(1.0)
    return Sampling(values["temperature"], max(0, values["top_k"]), min(1.0, values["top_p"]), values["min_p"])


def method_sampling(given: Mapping[str, Any], method: str, penalised: bool) -> dict[str, Any]:
    """Options of the method. A warning names what programs ask of the model alone and a search by it goes without.

    A temperature of 0 or less, to a method that samples, asks for nothing: a search gives the same answer each time.
    """
    known, found, without = defaults_of(method), dict[str, Any](), ["penalties"] * penalised
    for name, value in given.items():
        if value is None or (name == "temperature" and value <= 0 and known.get(name, 0) > 0):
            continue
        if name in known:
            found[name] = value
        elif value != _SAMPLING[name]:
            without.append(name)
    if without:
        warnings.warn(
            f"the method {method!r} goes without {', '.join(sorted(without))}; with budget=1 the model alone is "
            "sampled as llama.cpp does",
            stacklevel=3,
        )
    return found


def seed_of(seed: int | None, before: int) -> int:
    """The seed of a completion: -1 (or what a C program takes for it) is another one each time, as in llama.cpp, and
    None the next one after the last completion's."""
    if seed is None:
        return random.Random(before).randint(0, 2**32)
    return secrets.randbelow(_ANY_SEED) if seed in (-1, _ANY_SEED) else seed


def shown(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation as a reward reads it: text, with calls of tools as JSON. Raises InputError for pictures."""
    return [{"role": str(message.get("role")), "content": _content(message)} for message in messages]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise InputError("a message holds something other than text; the rewards read text only")
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    return "\n".join([content] * bool(content) + [json.dumps(call, ensure_ascii=False) for call in calls])
