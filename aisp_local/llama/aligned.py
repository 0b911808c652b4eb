"""``AlignedLlama``: a change of one import for programs that use llama-cpp-python."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from aisp_local import shipped
from aisp_local.api import Aligner
from aisp_local.background import events
from aisp_local.defaults import DEFAULT_METHOD, STREAMED, layered
from aisp_local.engine import LlamaEngine
from aisp_local.engine.base import as_strings
from aisp_local.errors import InputError
from aisp_local.grammar import Grammar
from aisp_local.llama import arguments
from aisp_local.llama.shapes import Answer, Shape
from aisp_local.llama.tap import Penalties, Settled, Tap
from aisp_local.models import find_model
from aisp_local.native import Lora, check_model_file
from aisp_local.native.binding import binding
from aisp_local.rewards import Reward, load_reward
from aisp_local.seeds import RowSeeds
from aisp_local.types import Controls, FinishReason, Progress, Prompt, Result

if TYPE_CHECKING:
    from llama_cpp import LlamaGrammar, LogitsProcessorList, StoppingCriteriaList, llama_types
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandler
    from llama_cpp.llama_tokenizer import BaseLlamaTokenizer

Tokens = npt.NDArray[np.int32]
Source = str | os.PathLike[str] | Reward | Callable[..., Any]

_DEFAULT_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED
_DEFAULT_TEMPLATE = "chat_template.default"
_CHAT_TEMPERATURE, _TEMPERATURE = 0.2, 0.8

_given: ContextVar[tuple[Prompt, Tokens] | None] = ContextVar("_given", default=None)
"""A prompt, and the tokens that llama-cpp-python's chat formats made of it."""


class _Reader(LlamaEngine):
    """An engine that reads given tokens, while the reward sees the prompt that they were made of."""

    def tokens(self, prompt: Prompt) -> Tokens:
        given = _given.get()
        return given[1] if given is not None and given[0] is prompt else super().tokens(prompt)


_Answering = Callable[["_Ask", Callable[[Answer], None] | None, Callable[[], bool]], Answer]
"""Gives the answer to a request and, if told to, what has settled of it before; until nobody listens any more."""


@dataclass(frozen=True)
class _Ask:
    """A completion that was asked for, checked."""

    prompt: Prompt  # as the reward sees it
    tokens: Tokens
    max_tokens: int
    stops: tuple[str, ...]
    seed: int
    temperature: float  # where none is given, of the model alone
    sampling: Mapping[str, Any]
    top: int | None
    penalties: Penalties
    processors: Sequence[Callable[[Any, Any], Any]]
    criteria: Callable[[Any, Any], bool] | None
    grammar: Grammar | None
    align: Mapping[str, Any]

    @property
    def plain(self) -> bool:
        return bool(self.align.get("budget") == 1)


class AlignedLlama:
    """``llama_cpp.Llama`` with aligned answers: the same arguments and responses, and alignment's beside them.

    ``reward`` and ``judge``: see ``Aligner.load``. Whatever ``Aligner.generate`` takes (``effort``, ``budget``,
    ``strength``, ``method``, ``n``, ``time_limit``, ...) can be given here, for all answers, or with each. ``budget=1``
    is the model alone, sampled as llama.cpp does it: no reward is asked, and tokens are streamed one by one.

    Change the import alone: ``from aisp_local import AlignedLlama as Llama``.

    What cannot be honoured is refused (InputError, a ValueError); what changes the speed only is named in a warning.
    The low-level interface (``eval``, ``sample``, ``generate``, ``embed``, states, caches) is llama_cpp.Llama's alone.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        reward: Source | None = None,
        judge: Source | None = None,
        n_gpu_layers: int = 0,
        seed: int = _DEFAULT_SEED,
        n_ctx: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        logits_all: bool = False,
        flash_attn: bool = False,
        last_n_tokens_size: int = 64,
        lora_scale: float = 1.0,
        lora_path: str | None = None,
        chat_format: str | None = None,
        chat_handler: LlamaChatCompletionHandler | None = None,
        tokenizer: BaseLlamaTokenizer | None = None,
        verbose: bool = True,
        **more: Any,
    ) -> None:
        """``n_ctx``: tokens of a prompt and its answer, 0 for the model's own context. ``flash_attn``: without it the
        engine chooses. ``logits_all`` is not needed for log-probabilities, and ``verbose`` prints nothing here.
        Raises ModelError, RewardError, InputError.
        """
        self._align = arguments.alignment(more)
        self.model_path, self.verbose = os.fspath(model_path), verbose
        self.chat_format, self.chat_handler = chat_format, chat_handler
        self.last_n_tokens_size = last_n_tokens_size
        path = find_model(self.model_path)
        check_model_file(path)  # what is checked sooner comes first, as in Aligner.load
        self._reward, self._judge = reward, judge
        if self._align.get("budget") != 1:
            self._load_rewards()
        self._engine = _Reader(
            path,
            n_gpu_layers=n_gpu_layers,
            threads=n_threads,
            n_ubatch=n_ubatch,
            flash_attention=flash_attn or None,
            loras=() if lora_path is None else (Lora(Path(lora_path), lora_scale),),
        )
        self._model = self._engine.model
        self._n_ctx = min(n_ctx or self._model.n_ctx_train, self._model.n_ctx_train)
        self._seed = seed
        self.tokenizer_ = tokenizer
        self.metadata = self._model.metadata()
        self._chat_handlers = self._handlers_of_templates()
        if self.chat_format is None and chat_handler is None:
            self.chat_format = _DEFAULT_TEMPLATE if _DEFAULT_TEMPLATE in self._chat_handlers else "llama-2"
        self.result: Result | None = None
        """The search behind the last answer; None if that was the model's alone."""

    def _load_rewards(self) -> tuple[Reward, Reward | None]:
        """The reward and the judge, loaded once."""
        if self._reward is None or not isinstance(self._reward, Reward):
            self._reward = load_reward(shipped.reward() if self._reward is None else self._reward)
        if self._judge is None:
            self._judge = getattr(self._reward, "judge", None)
        if self._judge is not None and not isinstance(self._judge, Reward):
            self._judge = load_reward(self._judge)
        return self._reward, self._judge

    @property
    def aligner(self) -> Aligner:
        """The same model and reward for searches in full: ``llm.aligner.generate(...)``."""
        reward, judge = self._load_rewards()
        return Aligner(self._engine, reward, judge=judge, model_name=self.model_path)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: list[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | Literal["auto"] = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> AlignedLlama:
        """Download a model from the Hugging Face hub, as ``llama_cpp.Llama`` does, and load it; ``kwargs``: how.

        Needs the package huggingface-hub. Raises ImportError without it, ValueError for a file that is not there.
        """
        made: AlignedLlama = _llama().from_pretrained.__func__(
            cls, repo_id, filename, additional_files, local_dir, local_dir_use_symlinks, cache_dir, **kwargs
        )
        return made

    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int | None = None,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
        **align: Any,
    ) -> llama_types.CreateCompletionResponse | Iterator[llama_types.CreateCompletionStreamResponse]:
        """The response, or with ``stream`` its chunks: block by block with the method "score", token by token with
        ``budget=1``, else at once. ``align``: see the class.

        ``temperature``, ``top_p``, ``top_k`` and ``min_p`` default to the method's own, with ``budget=1`` to
        llama-cpp-python's; what the method has not, and penalties, a warning names. ``logits_processor``,
        ``logit_bias`` and ``stopping_criteria`` need ``budget=1``.
        Raises InputError (a ValueError) for what cannot be, as where the prompt is longer than ``n_ctx``.
        """
        return self._complete(
            prompt,
            None,
            _TEMPERATURE,
            align,
            suffix=suffix,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            logprobs=logprobs,
            echo=echo,
            stop=stop,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            repeat_penalty=repeat_penalty,
            top_k=top_k,
            stream=stream,
            seed=seed,
            tfs_z=tfs_z,
            mirostat_mode=mirostat_mode,
            mirostat_tau=mirostat_tau,
            mirostat_eta=mirostat_eta,
            model=model,
            stopping_criteria=stopping_criteria,
            logits_processor=logits_processor,
            grammar=grammar,
            logit_bias=logit_bias,
        )

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: list[llama_types.ChatCompletionRequestMessage],
        functions: list[llama_types.ChatCompletionFunction] | None = None,
        function_call: llama_types.ChatCompletionRequestFunctionCall | None = None,
        tools: list[llama_types.ChatCompletionTool] | None = None,
        tool_choice: llama_types.ChatCompletionToolChoiceOption | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        response_format: llama_types.ChatCompletionRequestResponseFormat | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        **align: Any,
    ) -> llama_types.CreateChatCompletionResponse | Iterator[llama_types.CreateChatCompletionStreamResponse]:
        """``create_completion`` for messages, by llama-cpp-python's own chat formats; the reward sees the messages."""
        from llama_cpp import llama_chat_format

        handler = (
            self.chat_handler
            or self._chat_handlers.get(str(self.chat_format))
            or llama_chat_format.get_chat_completion_handler(self.chat_format)
        )
        if response_format is not None and grammar is None and layered(self._align, align).get("budget") != 1:
            grammar = arguments.grammar_of(response_format)
            response_format = response_format if grammar is None else None
        answer: llama_types.CreateChatCompletionResponse = handler(
            llama=_Asked(self, arguments.shown(messages), align),
            messages=messages,
            functions=functions,
            function_call=function_call,
            tools=tools,
            tool_choice=tool_choice,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            typical_p=typical_p,
            logprobs=logprobs,
            top_logprobs=(top_logprobs or 0) if logprobs else None,
            stream=stream,
            stop=stop,
            seed=seed,
            response_format=response_format,
            max_tokens=max_tokens,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repeat_penalty=repeat_penalty,
            tfs_z=tfs_z,
            mirostat_mode=mirostat_mode,
            mirostat_tau=mirostat_tau,
            mirostat_eta=mirostat_eta,
            model=model,
            logits_processor=logits_processor,
            grammar=grammar,
            logit_bias=logit_bias,
        )
        return answer

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """``create_chat_completion`` with the classes of the package openai, which it needs."""
        return _llama().create_chat_completion_openai_v1(self, *args, **kwargs)

    def _handlers_of_templates(self) -> dict[str, Any]:
        """A chat handler for each template in the model's file, by the names that llama-cpp-python gives them."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        prefix = "tokenizer.chat_template"
        names = {key: key.removeprefix(f"{prefix}.") for key in self.metadata if key.startswith(f"{prefix}.")}
        if prefix in self.metadata:
            names[prefix] = _DEFAULT_TEMPLATE
        bos, eos = self._model.token_text(self._model.bos), self._model.token_text(self._model.eos)
        return {
            name: Jinja2ChatFormatter(template=self.metadata[key], eos_token=eos, bos_token=bos).to_chat_handler()
            for key, name in names.items()
        }

    def _complete(
        self,
        prompt: str | Sequence[int],
        shown: Prompt | None,
        default_temperature: float,
        align: Mapping[str, Any],
        *,
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int | None = None,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
    ) -> Any:
        """``create_completion``; ``shown``: what the reward sees instead of the prompt."""
        if suffix is not None:
            raise InputError("suffix (infilling) is not supported; leave it out")
        if echo and logprobs is not None:
            raise InputError("the prompt has no log-probabilities here; leave out echo or logprobs")
        arguments.check_unsampled(
            {
                "typical_p": typical_p,
                "tfs_z": tfs_z,
                "mirostat_mode": mirostat_mode,
                "mirostat_tau": mirostat_tau,
                "mirostat_eta": mirostat_eta,
            }
        )
        arguments.check_align(align)
        tokens = self._prompt_tokens(prompt)
        if len(tokens) >= self._n_ctx:
            raise InputError(f"Requested tokens ({len(tokens)}) exceed context window of {self._n_ctx}")
        room = self._n_ctx - len(tokens)
        self._seed = seed = arguments.seed_of(seed, self._seed)
        processors = list(logits_processor or ())
        if logit_bias:
            processors.append(_biased({int(token): float(bias) for token, bias in logit_bias.items()}))
        text = prompt if isinstance(prompt, str) else self.detokenize(prompt).decode("utf-8", "ignore")
        ask = _Ask(
            prompt=text if shown is None else shown,
            tokens=tokens,
            max_tokens=room if max_tokens is None or max_tokens <= 0 else min(max_tokens, room),
            stops=tuple(text for text in as_strings(stop or ()) if text),
            seed=seed,
            temperature=default_temperature,
            sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p},
            top=logprobs,
            penalties=Penalties(self.last_n_tokens_size, repeat_penalty, frequency_penalty, presence_penalty),
            processors=processors,
            criteria=stopping_criteria,
            grammar=None if grammar is None else Grammar.of(getattr(grammar, "_grammar", grammar)),
            align=layered(self._align, align),
        )
        answer = self._plain if ask.plain else self._search
        shape = Shape(
            model=self.model_path if model is None else model,
            prompt_tokens=len(tokens),
            prompt_length=len(text),
            echo=text if echo else "",
        )
        return self._chunks(shape, ask, answer) if stream else shape.completion(answer(ask, None, lambda: False))

    def _prompt_tokens(self, prompt: str | Sequence[int]) -> Tokens:
        if not isinstance(prompt, str):
            tokens = np.array(prompt, np.int32)
        elif prompt.strip():
            tokens = self._engine.tokens(prompt)
        else:
            tokens = self._model.tokenize(prompt, add_special=True, parse_special=True)
        if not len(tokens):
            raise InputError("the prompt has no tokens; give some text")
        if tokens.min() < 0 or tokens.max() >= self._model.n_vocab:
            raise InputError(f"the prompt holds tokens that are not among the model's {self._model.n_vocab}")
        return tokens

    def _chunks(self, shape: Shape, ask: _Ask, answer: _Answering) -> Iterator[dict[str, Any]]:
        if shape.echo:
            yield shape.chunk(shape.echo)
        sent, noted, piece = "", 0, Answer("", "", 0)

        def work(put: Callable[[Answer], None], closed: Callable[[], bool]) -> None:
            put(answer(ask, put, closed))

        for piece in events(work):
            # What was cut short may end in another answer than the one that settled: it keeps what was sent.
            new = piece.text[len(sent) :] if piece.text.startswith(sent) else ""
            # Log-probabilities of what a search has sent block by block come with its end.
            if new or (piece.finish_reason and len(piece.entries or ()) > noted):
                yield shape.chunk(new, logprobs=shape.logprobs(piece.entries, noted))
                sent, noted = piece.text, len(piece.entries or ())
        yield shape.chunk("", piece.finish_reason)

    def _plain(self, ask: _Ask, put: Callable[[Answer], None] | None, closed: Callable[[], bool]) -> Answer:
        """The model alone."""
        settled = Settled(self._model.piece, ask.stops)

        def told(tokens: Tokens) -> None:
            if put is not None:
                put(Answer(settled(tokens), "", len(tokens), None if ask.top is None else tuple(tap.entries)))

        tap = Tap(
            ask.tokens,
            self._model.piece,
            processors=ask.processors,
            penalties=ask.penalties,
            criteria=ask.criteria,
            top=ask.top,
            told=None if put is None else told,
        )
        sampling = arguments.plain_sampling(ask.sampling, ask.temperature)
        with _reading(ask):
            rollouts = self._engine.rollout(
                ask.prompt,
                Controls(1, sampling=sampling, processor=tap if tap.needed else None),
                max_tokens=ask.max_tokens,
                seeds=RowSeeds(ask.seed),
                stop_strings=ask.stops,
                should_stop=lambda: closed() or tap.stopped is not None,
                grammar=ask.grammar,
            )
        self.result = None
        tokens, text, reason = rollouts.tokens[0], rollouts.texts[0], _finish(rollouts.finish_reasons[0])
        if tap.stopped is not None:
            tokens = tokens[: tap.stopped]
            text, reason = self._engine.text(tokens), "stop"
        elif len(tokens):
            tap.note(int(tokens[-1]))
            tokens = tokens[:-1] if self._model.eog[tokens[-1]] else tokens
        return Answer(text, reason, len(tokens), None if ask.top is None else tap.entries[: len(tokens)])

    def _search(self, ask: _Ask, put: Callable[[Answer], None] | None, closed: Callable[[], bool]) -> Answer:
        """The best of many."""
        align = dict(ask.align)
        method = align.get("method", DEFAULT_METHOD)
        for name, given in {
            "logits_processor or logit_bias": ask.processors,
            "stopping_criteria": ask.criteria,
        }.items():
            if given:
                raise InputError(f"{name} works with the model alone; leave it out, or use budget=1")
        align |= arguments.method_sampling(ask.sampling, method, ask.penalties.some)
        if put is not None and method in STREAMED:
            align |= STREAMED[method] | {"n": arguments.budget(align)}
        on_progress: Callable[[Progress], None] | None = align.pop("on_progress", None)

        def told(progress: Progress) -> None:
            if on_progress is not None:
                on_progress(progress)
            if put is not None and progress.settled:
                put(Answer(progress.settled, "", 0))

        with _reading(ask):
            self.result = self.aligner.generate(
                ask.prompt,
                max_tokens=ask.max_tokens,
                seed=ask.seed,
                stop_strings=ask.stops,
                grammar=ask.grammar,
                stop=closed,
                on_progress=told,
                **align,
            )
            best = self.result.candidates[0]
            entries = None if ask.top is None else self.aligner.token_logprobs(ask.prompt, best, ask.top)
        return Answer(best.text, _finish(best.finish_reason), best.n_tokens, entries)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokens of UTF-8 text, with those that its vocabulary begins with; ``special``: names of special tokens are
        such tokens."""
        if self.tokenizer_ is not None:
            return list(self.tokenizer_.tokenize(text, add_bos, special))
        decoded = text.decode("utf-8", "replace")
        found: list[int] = self._model.tokenize(decoded, add_special=add_bos, parse_special=special).tolist()
        return found

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """What tokens say; ``special``: special ones say their names. ``prev_tokens``: for a tokenizer of your own."""
        if self.tokenizer_ is not None:
            return bytes(self.tokenizer_.detokenize(list(tokens), prev_tokens=prev_tokens, special=special))
        text = b"".join(self._model.piece(token, special=special) for token in tokens)
        # As llama-cpp-python does: the space that some vocabularies put before the first word is not the text's.
        starts = len(tokens) > 0 and tokens[0] == self._model.bos and text.startswith(b" ")
        return text[1:] if starts else text

    def tokenizer(self) -> Any:
        """``llama_cpp.LlamaTokenizer`` for this model."""
        from llama_cpp import LlamaTokenizer

        return LlamaTokenizer(_Vocabulary(self))

    def set_seed(self, seed: int) -> None:
        """What the answers without a seed of their own draw from, one after the other."""
        self._seed = seed

    def set_cache(self, cache: object | None) -> None:
        """Nothing but a warning: the engine itself keeps the prompts that its cache holds."""
        if cache is not None:
            warnings.warn("AlignedLlama goes without the cache: its engine keeps prompts by itself", stacklevel=2)

    def n_ctx(self) -> int:
        return self._n_ctx

    def n_embd(self) -> int:
        return self._model.d

    def n_vocab(self) -> int:
        return self._model.n_vocab

    def token_bos(self) -> int:
        return self._model.bos

    def token_eos(self) -> int:
        return self._model.eos

    def token_nl(self) -> int:
        return self._model.newline

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    def __enter__(self) -> AlignedLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(_llama(), name):
            raise AttributeError(f"AlignedLlama has no {name}: that is llama_cpp.Llama's low-level interface")
        raise AttributeError(f"'AlignedLlama' object has no attribute {name!r}")


class _Asked:
    """The model as a chat handler sees it: its completions are asked for one conversation."""

    def __init__(self, llama: AlignedLlama, shown: Prompt, align: Mapping[str, Any]) -> None:
        self._llama, self._shown, self._aligned = llama, shown, align

    def create_completion(self, prompt: str | Sequence[int], **options: Any) -> Any:
        return self._llama._complete(prompt, self._shown, _CHAT_TEMPERATURE, self._aligned, **options)

    __call__ = create_completion

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)


class _Vocabulary:
    """What ``llama_cpp.LlamaTokenizer`` wants of a model."""

    def __init__(self, llama: AlignedLlama) -> None:
        self._model = llama


@contextmanager
def _reading(ask: _Ask) -> Iterator[None]:
    """Within the block the engine reads the tokens of this prompt."""
    token = _given.set((ask.prompt, ask.tokens))
    try:
        yield
    finally:
        _given.reset(token)


def _finish(reason: FinishReason) -> str:
    return "stop" if reason == "stop" else "length"


def _llama() -> Any:
    """``llama_cpp.Llama``, also where a program has put AlignedLlama into its place."""
    binding()
    from llama_cpp.llama import Llama

    return Llama


def _biased(biases: Mapping[int, float]) -> Callable[[Any, Any], Any]:
    tokens, values = np.array(list(biases), np.int64), np.array(list(biases.values()), np.float32)

    def add(_: Any, logits: Any) -> Any:
        logits[tokens] += values
        return logits

    return add
