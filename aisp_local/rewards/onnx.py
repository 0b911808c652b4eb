"""A reward model in a folder: ONNX Runtime, the tokenizer and reward.json."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import CapacityError, RewardError, ScoreError
from aisp_local.rewards.chat_template import ChatTemplate, usual_tokens
from aisp_local.rewards.external_data import external_locations
from aisp_local.rewards.graph_file import read_graph
from aisp_local.rewards.manifest import Manifest, check_files, inside, read_manifest
from aisp_local.rewards.runtime import open_session
from aisp_local.rewards.text import clean, prompt_text
from aisp_local.types import Message, Prompt

_BATCH_ROWS = 64
# Measured on CPUs (benchmarks/reward_speed.py): larger batches fall out of the caches, smaller ones wait for threads.
_BATCH_TOKENS = {"CPUExecutionProvider": 1024}
_BATCH_TOKENS_ELSEWHERE = 4096
# Padding that costs as much as a run of its own; on a CPU alone, where it is worth looking.
_PADDING = 64
# Responses that are tokenised before the first of them is scored: bounds memory, whatever their number.
_CHUNK = 512
# Prompts whose tokens are kept: an iteration of a search, or a turn of a chat, comes back with the same one.
_PROMPTS = 16
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
        self._prompts: dict[Any, Any] = {}  # what is known of the last prompts, oldest first
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def prefix(self) -> bool:
        """Whether it was trained to score unfinished responses too."""
        return self.manifest.prefix

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
        golden: bool = True,
    ) -> OnnxReward:
        """Load and verify a reward folder: manifest, hashes, paths, input names, golden scores.

        CUDA is used when ONNX Runtime offers it, else the CPU, with ``threads`` (default: one a core).
        ``golden``: compare the golden scores.
        Raises RewardError.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        model = inside(path, manifest.model)
        tokenizer_path = inside(path, manifest.tokenizer)
        check_files(path, manifest)
        _check_external(path, manifest, model)
        read_graph(model)
        session = open_session(model, providers, threads)
        _check_graph(path, manifest, session)
        reward = cls(manifest, session, _tokenizer(tokenizer_path))
        reward.score("a", ["a"])  # a folder without golden pairs shows here that its model runs
        if golden:
            reward._check_golden(path)
        return reward

    def score(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n]; they do not depend on the other responses beyond float rounding."""
        return self.score_many([prompt] * len(responses), responses)

    def score_many(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n] of n responses, each to its own prompt. Memory does not grow with n, but for the scores."""
        scores = np.zeros(len(responses), np.float32)
        for rows, output in self._runs(prompts, responses):
            scores[rows] = self._column(output)
        return scores

    def outputs(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """What the model itself gives, all columns of it: [n, k]."""
        found = np.zeros((0, self.manifest.index + 1), np.float32)
        for rows, output in self._runs([prompt] * len(responses), responses):
            if not len(found):
                found = np.zeros((len(responses), output.shape[1]), np.float32)
            found[rows] = output
        return found

    def _runs(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> Iterator[tuple[list[int], npt.NDArray[np.float32]]]:
        """Batches of similar length: which of the responses, and the model's output [batch, k]."""
        tokens = _BATCH_TOKENS.get(self.provider, _BATCH_TOKENS_ELSEWHERE)
        padding = _PADDING if self.provider in _BATCH_TOKENS else tokens
        for start in range(0, len(responses), _CHUNK):
            part = range(start, min(start + _CHUNK, len(responses)))
            rows = [self._encode(prompts[i], [responses[i]])[0] for i in part]
            for batch in _batches([len(ids) for ids, _ in rows], tokens, padding):
                yield [start + i for i in batch], self._run([rows[i] for i in batch])

    def _column(self, output: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Scores [n] from the model's output [n, k]."""
        if not 0 <= self.manifest.index < output.shape[1]:
            raise RewardError(
                f"the reward {self.name!r}: graph: 'index' is {self.manifest.index}, but the output "
                f"{self.manifest.output!r} has {output.shape[1]} columns; count from 0"
            )
        return np.asarray(self.manifest.sign * self.manifest.scale * output[:, self.manifest.index])

    def score_together(self, prompt: Prompt, responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Scores [n] from a single batch, whatever it takes: to see what padding and the others do to a score."""
        return self._column(self._run(self._encode(prompt, responses))) if responses else np.zeros(0, np.float32)

    @property
    def tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` of the folder."""
        return self._tokenizer

    def token_ids(self, prompt: Prompt, response: str) -> list[int]:
        """What the model reads of a response to a prompt."""
        return self.tokens(prompt, [response])[0][0]

    def run_ids(self, ids: Sequence[int]) -> float:
        """The score of tokens as they are. Raises ScoreError when the model refuses them."""
        return float(self._column(self._run([(list(ids), [0] * len(ids))]))[0])

    def lengths(self, prompt: Prompt, responses: Sequence[str]) -> list[int]:
        """Tokens [n] that the model reads, special ones and the prompt's included."""
        return [len(ids) for ids, _ in self.tokens(prompt, responses)]

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
        head = self._known(prompt_text(prompt), lambda text: self._long_ids(clean(text), left=truncation != "right"))
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

    def _known(self, key: Any, make: Callable[[Any], Any]) -> Any:
        """``make(key)``, remembered for the last few prompts."""
        with self._lock:
            found = self._prompts.get(key)
        if found is None:
            found = make(key)
            with self._lock:
                while len(self._prompts) >= _PROMPTS:
                    del self._prompts[next(iter(self._prompts))]
                self._prompts[key] = found
        return found

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
        ids, limit = self._render(turns, self._opening(turns)), self.manifest.max_length
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
    def _template(self) -> ChatTemplate:
        before, _, after = self._special_ids
        special = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        tokens = usual_tokens(special)
        # What it puts around a text itself is surer than a name.
        tokens |= {"bos_token": self._tokenizer.id_to_token(before[0])} if before else {}
        tokens |= {"eos_token": self._tokenizer.id_to_token(after[-1])} if after else {}
        return ChatTemplate(self.manifest.template or "", self.name, tokens, special)

    def _opening(self, turns: Sequence[Message]) -> tuple[str, list[int]]:
        """What a conversation begins with whatever its response, up to its last special token, and its ids.

        Empty where there is no special token: then the texts before and after a cut are not tokenised apart.
        """

        def make(_: str) -> tuple[str, list[int]]:
            first, second = (
                self._template.render([*turns[:-1], {**turns[-1], "content": word}]) for word in ("a", "b")
            )
            common = os.path.commonprefix([first, second])
            text = common[: max((common.rfind(token) for token in self._boundaries), default=0)]
            if not text or text == common:
                return "", []
            ids = self._ids(text)
            # Some tokenizers look across special tokens after all.
            return (text, ids) if ids + self._ids(first[len(text) :]) == self._ids(first) else ("", [])

        found: tuple[str, list[int]] = self._known(f"chat {json.dumps(turns[:-1], default=str)}", make)
        return found

    @cached_property
    def _boundaries(self) -> list[str]:
        """Special tokens that are cut out of a text, and of nothing beside them, before it is tokenised."""
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        return [t.content for t in tokens if t.special and not (t.lstrip or t.rstrip or t.normalized or t.single_word)]

    def _render(self, turns: Sequence[Message], opening: tuple[str, list[int]] = ("", [])) -> list[int]:
        """Ids of the turns as the chat template writes them, of any length."""
        before, _, after = self._special_ids
        text = self._template.render(turns)
        known, begin = opening
        if known and text.startswith(known):
            ids = begin + self._ids(text[len(known) :])
            if self.manifest.adds_special:
                ids = before + ids + after
        else:
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
            output = np.asarray(self._outputs(feed), np.float32)
        except Exception as error:  # ONNX Runtime raises its own kinds, all of them plain exceptions
            raise ScoreError(f"the reward {self.name!r} failed: {error}") from error
        if output.ndim not in (1, 2) or len(output) != len(rows):
            raise RewardError(
                f"the reward {self.name!r}: the output {self.manifest.output!r} has the shape {output.shape} for "
                f"{len(rows)} responses; it must be [n] or [n, k]: name another output, or export the model again"
            )
        return output.reshape(len(rows), -1)

    def _outputs(self, feed: dict[str, npt.NDArray[np.int64]]) -> Any:
        """The model's output, where it runs on a GPU without a copy of the other outputs."""
        if self.provider == "CPUExecutionProvider":
            return self._session.run([self.manifest.output], feed)[0]
        return self._bound(feed)

    def _bound(self, feed: dict[str, npt.NDArray[np.int64]]) -> Any:
        """The same through I/O binding: a binding of its own for every call, since threads share the session."""
        binding = self._session.io_binding()
        for name, values in feed.items():
            binding.bind_cpu_input(name, values)
        binding.bind_output(self.manifest.output)  # in memory that numpy reads
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    def _check_golden(self, folder: Path) -> None:
        for golden in self.manifest.golden:
            found = float(self.score(golden.prompt, [golden.response])[0])
            if not abs(found - golden.score) <= self.manifest.tolerance:
                raise RewardError(
                    f"{folder} scores its golden response {golden.response[:40]!r} {found:.4f} instead of "
                    f"{golden.score:.4f}; model and tokenizer do not belong together, or ONNX Runtime differs"
                )


def _batches(lengths: Sequence[int], tokens: int, padding: int) -> list[list[int]]:
    """Indices in batches of similar length: ``tokens`` in all, ``padding`` in a row."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        last = batches[-1] if batches else []
        longest = lengths[last[0]] if last else 0
        full = len(last) >= _BATCH_ROWS or (len(last) + 1) * longest > tokens or longest - lengths[i] > padding
        if last and not full:
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


def _check_external(folder: Path, manifest: Manifest, model: Path) -> None:
    """What the model keeps in other files lies in the folder and is hashed. ONNX Runtime looks beside the model."""
    listed = {PurePosixPath(name) for name in manifest.files}
    for location in external_locations(model):
        if location.startswith(_MEMORY):
            raise RewardError(
                f"{folder}: {manifest.model} takes a tensor from an address in memory ({location!r}); "
                "a file must not: export the model again"
            )
        name = PurePosixPath(manifest.model).parent / location
        inside(folder, str(name))
        if name not in listed:
            raise RewardError(f"{folder}: {manifest.model} uses {str(name)!r}, which has no sha256 in 'files'")
        if model.is_symlink():  # some versions look beside the link, others beside what it leads to
            raise RewardError(
                f"{folder}: {manifest.model} is a link and keeps tensors in {str(name)!r}; put the file itself there"
            )


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
