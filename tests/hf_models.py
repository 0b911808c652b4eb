"""Small Hugging Face reward models with random weights and tokenizers trained on the spot, one an architecture.

BOS, EOS, padding and chat templates are as the architecture's known models have them. Needs torch and transformers.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from aisp_local.reward_kit.export.quiet import quiet
from aisp_local.reward_kit.export.source import DECODERS, ENCODERS
from aisp_local.reward_kit.export.texts import PAIRS

FAMILIES = ENCODERS + DECODERS
CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{- bos_token }}\n{%- if tools is not none %}{{- 'Tools: ' }}{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
    "+ '<|eot_id|>' }}\n{%- endfor %}\n"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


CORPUS = [text for pair in PAIRS for text in pair]


def _pieces(special: Sequence[str], inner: str) -> dict[str, int]:
    """Ids of special tokens, characters and words. The trainers of WordPiece and Unigram give others each time.

    ``inner`` marks pieces inside a word; "": those at its beginning are marked, as Metaspace does.
    """
    words = Counter(word for text in CORPUS for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    ascii_ = string.ascii_letters + string.digits + string.punctuation
    known = sorted(set("".join(CORPUS).lower() + ascii_) - {" ", "\n"})
    whole = sorted(words, key=lambda word: (-words[word], word))[:200]
    if inner:
        pieces = [*special, *whole, *known, *(inner + character for character in known)]
    else:
        pieces = [*special, *("▁" + word for word in whole), "▁", *known]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def tokenizer(family: str) -> Any:
    """A transformers tokenizer of a few hundred tokens."""
    from transformers import PreTrainedTokenizerFast

    names: dict[str, str] = {}
    template: str | None = None
    extra: list[str] = []
    if family in ("Bert", "DebertaV2", "ModernBert"):
        special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
        names = {f"{name.strip('[]').lower()}_token": name for name in special}
    elif family == "Roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>"}
        names |= {"eos_token": "</s>", "unk_token": "<unk>"}
    elif family == "Llama":  # padding is the end of the text, as people set it
        special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
        names = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[1]}
        template = LLAMA
    elif family in ("Qwen2", "Qwen3"):  # no BOS
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        names = {"eos_token": special[2], "pad_token": special[0]}
        template = CHATML
    elif family == "Gemma2":
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
        template = GEMMA
    else:  # Mistral: no padding token at all
        special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        template = MISTRAL
    extra = [token for token in special if token not in names.values()]

    made: Any
    if family == "Bert":
        made = Tokenizer(models.WordPiece(_pieces(special, "##"), unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
    elif family == "DebertaV2":
        scored = [(piece, 0.0 if piece in special else -1.0 - i / 100) for piece, i in _pieces(special, "").items()]
        made = Tokenizer(models.Unigram(scored, special.index("[UNK]")))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif family in ("Gemma2", "Mistral"):
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if family in ("Bert", "DebertaV2"):
        made.add_special_tokens(special)
    else:
        alphabet = [] if family in ("Gemma2", "Mistral") else pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=480 if alphabet else 400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(CORPUS, trainer)
    ids = {token: made.token_to_id(token) for token in special}

    def around(single: str, pair: str) -> Any:
        used = [(token, ids[token]) for token in special if token in single + pair]
        return processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)

    if family in ("Bert", "DebertaV2", "ModernBert"):
        made.post_processor = around("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    elif family == "Roberta":
        made.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    elif "bos_token" in names:
        bos = names["bos_token"]
        made.post_processor = around(f"{bos} $A", f"{bos} $A {bos}:1 $B:1")
    inputs = ["input_ids", "attention_mask"]
    if family in ("Bert", "DebertaV2"):
        inputs.append("token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=512,
        model_input_names=inputs,
        additional_special_tokens=extra,
        chat_template=template,
        **names,
    )


def config(family: str, made: Any, labels: int = 1) -> Any:
    """A small configuration with the traits that matter: sliding windows, grouped heads, buckets, soft-caps."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": len(made),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_labels": labels,
        "max_position_embeddings": 512,
        "pad_token_id": made.pad_token_id,
        "bos_token_id": made.bos_token_id,
        "eos_token_id": made.eos_token_id,
    }
    more: dict[str, dict[str, Any]] = {
        "Roberta": {"type_vocab_size": 1, "max_position_embeddings": 514},
        "DebertaV2": {
            "relative_attention": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
            "max_relative_positions": -1,
        },
        "ModernBert": {
            "global_attn_every_n_layers": 2,
            "local_attention": 16,
            "cls_token_id": made.cls_token_id,
            "sep_token_id": made.sep_token_id,
            "classifier_pooling": "mean",
        },
        "Llama": {"num_key_value_heads": 2},
        "Qwen2": {"num_key_value_heads": 2},
        "Qwen3": {"num_key_value_heads": 2, "head_dim": 32},
        "Gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
        "Mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    }
    return getattr(transformers, f"{family}Config")(**(sizes | more.get(family, {})))


def write(folder: Path, family: str, *, labels: int = 1, **changes: Any) -> Path:
    """A folder as save_pretrained writes it; ``changes`` are written into config.json afterwards."""
    with quiet():
        import torch
        import transformers

        torch.manual_seed(0)
        made = tokenizer(family)
        model = getattr(transformers, f"{family}ForSequenceClassification")(config(family, made, labels))
        with torch.no_grad():  # as transformers draws them, two layers hardly move a score
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.12)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        made.save_pretrained(folder)
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def rows(seed: int, lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Token ids of rows of those lengths, special ones among them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]
