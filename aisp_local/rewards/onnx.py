"""A reward model in a folder: ONNX Runtime, the tokenizer and reward.json."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import AispError, CapacityError, RewardError, ScoreError
from aisp_local.rewards.external_data import external_locations
from aisp_local.rewards.manifest import Manifest, check_files, inside, read_manifest
from aisp_local.rewards.text import clean, prompt_text
from aisp_local.types import Message, Prompt

_BATCH_TOKENS = 4096
_BATCH_ROWS = 64
# Longer texts are first cut to this many characters a token of max_length.
_CHARACTERS_PER_TOKEN = 64
# ONNX Runtime reads these external-data locations as pointers into its own process.
_MEMORY = "*/_ORT_"


class OnnxReward:
    """Scores with the ONNX model of a reward folder. One session, safe to share between threads."""

    background = True  # it leaves Python alone while it runs, so that rows decode meanwhile

    def __init__(self, manifest: Manifest, session: Any, tokenizer: Any) -> None:
        self.manifest = manifest
        self._session = session
        self._tokenizer = tokenizer
        self._special = tokenizer.num_special_tokens_to_add(manifest.kind == "pair")

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def provider(self) -> str:
        """The execution provider that runs the model."""
        return str(self._session.get_providers()[0])

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> OnnxReward:
        """Load and verify a reward folder: manifest, hashes, paths, input names, golden scores.

        CUDA is used when ONNX Runtime offers it, else the CPU. Raises RewardError.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        model = inside(path, manifest.model)
        tokenizer_path = inside(path, manifest.tokenizer)
        check_files(path, manifest)
        for location in external_locations(model):
            if location.startswith(_MEMORY):
                raise RewardError(
                    f"{path}: {manifest.model} takes a tensor from an address in memory ({location!r}); "
                    "a file must not: export the model again"
                )
            inside(path, location)
            if location not in manifest.files:
                raise RewardError(f"{path}: {manifest.model} uses {location!r}, which has no sha256 in 'files'")
        session = _session(model, providers, threads)
        _check_graph(path, manifest, session)
        reward = cls(manifest, session, _tokenizer(tokenizer_path))
        reward.score("a", ["a"])  # a folder without golden pairs shows here that its model runs
        reward._check_golden(path)
        return reward

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n]; they do not depend on the other responses beyond float rounding."""
        rows = self._encode(prompt, responses)
        scores = np.zeros(len(rows), np.float32)
        for batch in _batches([len(ids) for ids, _ in rows]):
            scores[batch] = self._run([rows[i] for i in batch])
        return scores

    def tokens(self, prompt: Prompt, responses: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """What the model reads of each response: token ids and type ids, special tokens included."""
        return self._encode(prompt, responses)

    def _encode(self, prompt: Prompt, responses: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids and type ids of each input, cut to max_length."""
        kind, limit = self.manifest.kind, self.manifest.max_length
        if kind == "chat":
            return [(ids := self._chat_ids(prompt, r), [0] * len(ids)) for r in responses]
        truncation = self.manifest.truncation
        texts = [self._long_ids(clean(r), left=truncation == "left") for r in responses]
        room = limit - self._special
        if kind == "text":
            cut = [ids[-room:] if truncation == "left" else ids[:room] for ids in texts]
            return [self._join(ids, None) for ids in cut]
        head = self._long_ids(clean(prompt_text(prompt)), left=truncation != "right")
        pairs = []
        for ids in texts:
            if truncation == "right":
                left = head[:room]
                right = ids[: room - len(left)]
            else:
                right = ids[-room:] if truncation == "left" else ids[:room]
                left = head[max(0, len(head) - (room - len(right))) :]
            pairs.append(self._join(left, right))
        return pairs

    def _long_ids(self, text: str, *, left: bool) -> list[int]:
        """Ids of a text of any length, right in the first (``left``: last) max_length of them."""
        bound = self.manifest.max_length * _CHARACTERS_PER_TOKEN
        while True:
            ids = self._ids(text[-bound:] if left else text[:bound])
            # Twice the limit: what the cut did to the tokens beside it lies beyond the limit.
            if bound >= len(text) or len(ids) >= 2 * self.manifest.max_length:
                return ids
            bound *= 8  # blanks and unknown words: many characters, few tokens

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _join(self, first: list[int], second: list[int] | None) -> tuple[list[int], list[int]]:
        """Put the special tokens of the tokenizer around one or two lists of ids."""
        if not self.manifest.adds_special:
            return first + (second or []), [0] * len(first) + [1] * len(second or [])
        prefix, middle, suffix = self._special_ids
        ids = prefix + first + (middle + second if second is not None else []) + suffix
        types = [0] * (len(prefix) + len(first))
        if second is not None:
            types += [0] * len(middle) + [1] * (len(second) + len(suffix))
        else:
            types += [0] * len(suffix)
        return ids, types

    @cached_property
    def _special_ids(self) -> tuple[list[int], list[int], list[int]]:
        """Special tokens before, between and after, from the tokenizer's own post-processor."""
        pair = self.manifest.kind == "pair"
        marker = "a"
        inner = self._ids(marker)
        whole = self._tokenizer.encode(marker, marker).ids if pair else self._tokenizer.encode(marker).ids
        first = _find(whole, inner, 0)
        after = first + len(inner)
        if not pair:
            return whole[:first], [], whole[after:]
        second = _find(whole, inner, after)
        return whole[:first], whole[after:second], whole[second + len(inner) :]

    def _chat_ids(self, prompt: Prompt, response: str) -> list[int]:
        """Ids of the rendered conversation, the response being its last turn, cut to max_length."""
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        turns: list[Message] = [{**m, "content": clean(m["content"])} for m in messages]
        turns.append({"role": "assistant", "content": clean(response)})
        ids, limit = self._render(turns), self.manifest.max_length
        if self.manifest.truncation == "right":
            return ids[:limit]
        if self.manifest.truncation == "left":
            return ids[-limit:]
        # Texts are cut, oldest first and the response last, and rendered again: the template stays whole.
        for turn in turns:
            while len(ids) > limit and turn["content"]:
                turn["content"] = self._shorter(turn["content"], len(ids) - limit, left=turn is not turns[-1])
                ids = self._render(turns)
        if len(ids) > limit:
            raise CapacityError(
                f"the chat template of the reward {self.name!r} takes {len(ids)} tokens for {len(turns)} turns "
                f"without their text, and max_length is {limit}; use fewer turns or a greater max_length"
            )
        return ids

    def _shorter(self, text: str, tokens: int, *, left: bool) -> str:
        """The text without about so many tokens at its beginning (``left``) or end, at least one character."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        if tokens >= len(offsets):
            return ""
        if left:
            return text[max(1, offsets[tokens][0]) :]
        return text[: min(len(text) - 1, offsets[-tokens - 1][1])]

    @cached_property
    def _template(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(self.manifest.template or "")

    def _render(self, turns: Sequence[Message]) -> list[int]:
        """Ids of the turns as the chat template writes them, of any length."""
        before, _, after = self._special_ids
        try:
            text = self._template.render(
                messages=turns,
                bos_token=self._tokenizer.id_to_token(before[0]) if before else "",
                eos_token=self._tokenizer.id_to_token(after[-1]) if after else "",
            )
        except Exception as error:  # a template may raise whatever Python can
            raise ScoreError(f"the chat template of the reward {self.name!r} failed: {error}") from error
        ids = list(self._tokenizer.encode(text, add_special_tokens=self.manifest.adds_special).ids)
        if self.manifest.adds_special and before and ids[:2] == 2 * before[:1]:
            ids = ids[1:]  # the template wrote the BOS that the tokenizer added too
        return ids

    def _run(self, rows: list[tuple[list[int], list[int]]]) -> npt.NDArray[np.float32]:
        longest = max(1, max(len(ids) for ids, _ in rows))
        values = {
            role: np.zeros((len(rows), longest), np.int64) for role in ("input_ids", "attention_mask", "token_type_ids")
        }
        for i, (ids, types) in enumerate(rows):
            values["input_ids"][i, : len(ids)] = ids
            values["attention_mask"][i, : len(ids)] = 1
            values["token_type_ids"][i, : len(types)] = types
        feed = {name: values[role] for role, name in self.manifest.inputs.items()}
        try:
            (output,) = self._session.run([self.manifest.output], feed)
        except Exception as error:  # ONNX Runtime raises its own kinds, all of them plain exceptions
            raise ScoreError(f"the reward {self.name!r} failed: {error}") from error
        output = np.asarray(output, np.float32).reshape(len(rows), -1)
        if not 0 <= self.manifest.index < output.shape[1]:
            raise RewardError(
                f"the reward {self.name!r}: graph: 'index' is {self.manifest.index}, but the output "
                f"{self.manifest.output!r} has {output.shape[1]} columns; count from 0"
            )
        return np.asarray(self.manifest.sign * self.manifest.scale * output[:, self.manifest.index])

    def _check_golden(self, folder: Path) -> None:
        for golden in self.manifest.golden:
            found = float(self.score(golden.prompt, [golden.response])[0])
            if not abs(found - golden.score) <= self.manifest.tolerance:
                raise RewardError(
                    f"{folder} scores its golden response {golden.response[:40]!r} {found:.4f} instead of "
                    f"{golden.score:.4f}; model and tokenizer do not belong together, or ONNX Runtime differs"
                )


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in batches of similar length."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        last = batches[-1] if batches else None
        if last and len(last) < _BATCH_ROWS and (len(last) + 1) * lengths[last[0]] <= _BATCH_TOKENS:
            last.append(i)
        else:
            batches.append([i])
    return batches


def _find(whole: Sequence[int], part: Sequence[int], start: int) -> int:
    for i in range(start, len(whole) - len(part) + 1):
        if list(whole[i : i + len(part)]) == list(part):
            return i
    raise RewardError("the tokenizer's special tokens cannot be told apart from its text")


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise RewardError(f"{path} is not a tokenizer file ({error}); restore it") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _has_gpu() -> bool:
    """Whether an NVIDIA driver is there: asking ONNX Runtime for CUDA without one fills the screen with errors."""
    return os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi") is not None


def _session(model: Path, providers: Sequence[str] | None, threads: int | None) -> Any:
    # Its official builds report to Microsoft unless told otherwise: the variable counts before the first import, in
    # which it makes files and a device id; the call silences a runtime that somebody else has imported already.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise AispError(f"ONNX Runtime does not load ({error}); install it with: pip install onnxruntime") from error
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Spinning threads would take the cores that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if providers is None:
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider") if _has_gpu() else ("CPUExecutionProvider",)
        providers = [p for p in wanted if p in ort.get_available_providers()]
    try:
        return ort.InferenceSession(str(model), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime raises its own kinds, all of them plain exceptions
        reason = str(error).splitlines()[0][:200]
        raise RewardError(f"{model} cannot be loaded by ONNX Runtime ({reason}); restore it") from error


def _check_graph(folder: Path, manifest: Manifest, session: Any) -> None:
    inputs = [i.name for i in session.get_inputs()]
    outputs = [o.name for o in session.get_outputs()]
    for role, name in manifest.inputs.items():
        if role not in ("input_ids", "attention_mask", "token_type_ids"):
            raise RewardError(f"{folder}: the input role {role!r} is unknown")
        if name not in inputs:
            raise RewardError(f"{folder}: {manifest.model} has no input {name!r}; its inputs are {', '.join(inputs)}")
    missing = sorted(set(inputs) - set(manifest.inputs.values()))
    if missing:
        raise RewardError(f"{folder}: the input {missing[0]!r} of {manifest.model} is not in the manifest")
    if manifest.output not in outputs:
        raise RewardError(
            f"{folder}: {manifest.model} has no output {manifest.output!r}; its outputs are {', '.join(outputs)}"
        )
