"""How a model is fed: its tokenizer, the kind of input, and the chat template as reward.json holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from aisp_local.errors import InputError, RewardError
from aisp_local.reward_kit.export.quiet import quiet
from aisp_local.reward_kit.export.source import Source
from aisp_local.rewards.chat_template import NOW
from aisp_local.rewards.manifest import Kind, Manifest

# Where neither the tokenizer nor --max-length says less: prompt and response of a few pages.
_LONGEST = 4096
DATE = NOW.strftime("%d %b %Y")
"""What Llama 3's templates write without a clock."""
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")


@dataclass(frozen=True)
class Feed:
    """What "input" of the manifest will say, and the tokenizer of transformers that it was read from."""

    kind: Kind
    template: str | None
    bos: Literal["tokenizer", "none"]
    max_length: int
    types: bool  # the model reads token types
    tokenizer: Any

    def plain_tokenizer(self) -> Any:
        """The tokenizer itself, without padding and truncation."""
        from tokenizers import Tokenizer

        plain = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        return plain

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json: the names of the special tokens, and what the model reads."""
        names = {key: str(getattr(self.tokenizer, key)) for key in _SPECIAL if getattr(self.tokenizer, key, None)}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_length,
            "model_input_names": list(self.tokenizer.model_input_names),
            **names,
        }

    def manifest(self) -> Manifest:
        """What reward.json says of the input, for the tokens alone: there are no files yet."""
        return Manifest(
            name="",
            description="",
            model="",
            tokenizer="",
            kind=self.kind,
            template=self.template,
            max_length=self.max_length,
            truncation="prompt-left",
            adds_special=self.bos == "tokenizer",
            inputs={},
            output="",
            index=0,
            sign=1,
            scale=1.0,
            licence="",
            files={},
            golden=(),
            tolerance=0.0,
        )

    def ids(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Ids and token types as transformers itself makes them, of any length."""
        if self.kind == "chat":
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            more = {"date_string": DATE} if "date_string" in (self.template or "") else {}
            ids = list(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **more)["input_ids"])
            return ids, [0] * len(ids)
        texts = (prompt, response) if self.kind == "pair" else (response,)
        out = self.tokenizer(*texts, return_token_type_ids=True, verbose=False)
        return list(out["input_ids"]), list(out["token_type_ids"])


def read(source: Source, kind: Kind | None, max_length: int | None) -> Feed:
    """The feed of a source; None: what the tokenizer suggests. Raises InputError for what cannot be."""
    if not any(any(source.folder.glob(pattern)) for pattern in _VOCABULARIES):  # transformers makes up an empty one
        raise RewardError(
            f"{source.folder} holds no tokenizer (tokenizer.json, vocab.txt, *.model, ...); restore the folder"
        )
    try:
        with quiet():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its many tokenizers raise
        raise RewardError(f"{source.folder}: the tokenizer cannot be read ({_first_line(error)})") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise RewardError(f"{source.folder}: the tokenizer has no tokenizer.json and cannot be made into one")
    template = _template(source, tokenizer)
    if kind is None:
        if template is None and source.decoder:
            raise InputError(
                f"the tokenizer of {source.folder} has no chat template, so how prompt and response are put together "
                "is unknown; say it with --input pair or --input text"
            )
        kind = "pair" if template is None else "chat"
    if kind == "chat" and template is None:
        raise InputError(f"the tokenizer of {source.folder} has no chat template; use --input pair or --input text")
    return Feed(
        kind=kind,
        template=_with_tokens(template, tokenizer) if kind == "chat" and template is not None else None,
        # A template holds its special tokens; those of the tokenizer would come a second time.
        bos="none" if kind == "chat" else "tokenizer",
        max_length=_max_length(source, tokenizer, max_length),
        types=_reads_types(source) and "token_type_ids" in tokenizer.model_input_names,
        tokenizer=tokenizer,
    )


def _template(source: Source, tokenizer: Any) -> str | None:
    """The chat template, of several the one that is called "default". Raises RewardError for what is none."""
    found = tokenizer.chat_template
    if isinstance(found, dict) and found:
        if "default" not in found:
            raise RewardError(
                f"{source.folder}: the tokenizer has the chat templates {', '.join(map(repr, found))} and none called "
                "'default'; call one of them so in tokenizer_config.json"
            )
        found = found["default"]
    if found and not isinstance(found, str):
        raise RewardError(
            f"{source.folder}: the tokenizer's chat template is no text, but {found!r:.40}; repair "
            "tokenizer_config.json"
        )
    return found or None


def _whole(source: Source, key: str, usual: int) -> int:
    """A whole number of config.json; what it leaves out, or says to be null, is as usual. Raises RewardError."""
    value = source.config.get(key)
    if value is None:
        return usual
    if not isinstance(value, int) or isinstance(value, bool):
        raise RewardError(f"{source.folder / 'config.json'}: {key!r} is {value!r:.40}, not a whole number; repair it")
    return value


def _reads_types(source: Source) -> bool:
    return _whole(source, "type_vocab_size", 2 if source.family == "Bert" else 0) > 1


def _max_length(source: Source, tokenizer: Any, asked: int | None) -> int:
    positions = _whole(source, "max_position_embeddings", 512)
    if source.family == "Roberta":  # its positions begin behind the padding token's
        if source.config.get("pad_token_id", 1) is None:
            raise RewardError(
                f"{source.folder / 'config.json'}: 'pad_token_id' is null, and the positions of RoBERTa begin behind "
                "it; restore it (1 in most)"
            )
        positions -= _whole(source, "pad_token_id", 1) + 1
    if asked is None:
        known = tokenizer.model_max_length
        if not isinstance(known, (int, float)):
            raise RewardError(
                f"{source.folder}: 'model_max_length' of the tokenizer is {known!r:.40}, not a number; repair "
                "tokenizer_config.json"
            )
        return int(max(8, min(positions, known, _LONGEST)))
    if not 8 <= asked <= 1 << 17:
        raise InputError(f"--max-length {asked} is not between 8 and 131072")
    if asked > positions:
        raise InputError(f"--max-length {asked} is more than the {positions} positions that the model knows")
    return asked


def _with_tokens(template: str, tokenizer: Any) -> str:
    """The template with what transformers gives it beside the messages written into it.

    Scores are computed without tokenizer_config.json, so that nothing else would know the names of the special tokens.
    """
    known: dict[str, str] = {
        key: json.dumps(str(getattr(tokenizer, key)), ensure_ascii=False)
        for key in _SPECIAL
        if key in template and getattr(tokenizer, key, None) is not None
    }
    known |= {key: "none" for key in ("tools", "documents") if key in template}
    if "add_generation_prompt" in template:
        known["add_generation_prompt"] = "false"
    if "date_string" in template:
        known["date_string"] = json.dumps(DATE)
    # "+%}": what follows keeps its first line break.
    return "".join(f"{{% set {key} = {value} +%}}" for key, value in known.items()) + template


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
