"""GGUF files: writing the network for llama.cpp, and reading one back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from training.network import Network, Shape
from training.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, SPECIAL_TOKENS, TURN_END

MATRICES = gguf.GGMLQuantizationType.Q8_0


def write_gguf(
    path: Path, network: Network, tokenizer: Tokenizer, *, name: str, description: str, licence: str
) -> None:
    """Write matrices as Q8_0 and norms as F32, whole or not at all."""
    shape = network.shape
    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_name(name)
    writer.add_author("aisp-local")
    writer.add_license(licence)
    writer.add_description(description)
    writer.add_languages(["en"])
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    write_tokenizer(writer, tokenizer, shape.vocabulary)
    for key, value in network.state_dict().items():
        array = value.detach().float().cpu().numpy()
        if value.ndim == 1:
            writer.add_tensor(key, array)
        else:
            writer.add_tensor(key, quantize(array, MATRICES), raw_dtype=MATRICES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocabulary: int) -> None:
    """Tokens, merges, special tokens and the chat template."""
    description = json.loads(tokenizer.to_str())
    pieces = {index: token for token, index in tokenizer.get_vocab().items()}
    special = gguf.TokenType.CONTROL
    kinds = [special if i < len(SPECIAL_TOKENS) else gguf.TokenType.NORMAL for i in range(vocabulary)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([pieces[i] for i in range(vocabulary)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(TURN_END)
    writer.add_eot_token_id(TURN_END)
    writer.add_pad_token_id(END_OF_TEXT)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def read_gguf(path: Path) -> tuple[Network, Tokenizer]:
    """The network (weights as stored, computed in float32) and tokenizer of a GGUF file."""
    reader = gguf.GGUFReader(path)

    def field(key: str) -> object:
        return reader.fields[key].contents()

    shape = Shape(
        vocabulary=len(field("tokenizer.ggml.tokens")),
        width=field("llama.embedding_length"),
        layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        feed_forward=field("llama.feed_forward_length"),
        context=field("llama.context_length"),
        norm_epsilon=field("llama.attention.layer_norm_rms_epsilon"),
    )
    state: dict[str, Tensor] = {
        tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }
    network = Network(shape)
    network.load_state_dict(state)
    return network.eval(), rebuild_tokenizer(field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"))


def read_model(path: Path) -> tuple[Network, Tokenizer]:
    """The network and tokenizer of a GGUF file or of a checkpoint (its averaged weights)."""
    if not path.is_file():
        raise SystemExit(f"error: there is no model file {path}.")
    if path.suffix == ".gguf":
        return read_gguf(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = Network(Shape(**state["shape"]))
    network.load_state_dict(state["average"])
    return network.eval(), Tokenizer.from_str(state["tokenizer"])


def rebuild_tokenizer(tokens: list[str], merges: list[str]) -> Tokenizer:
    """The `tokenizers` object of a file's token list and merges."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer
