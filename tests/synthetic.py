"""Small random-weight GGUFs of any architecture, deterministic by seed.

llama.cpp itself says which tensors of which shape an architecture has (``llama_model_init_from_user``, as in its
own test-llama-archs); numpy fills them. ``vocab="none"`` writes a model that only takes token ids; ``vocab="bpe"``
adds a real byte-level tokenizer and a chat template, so that text goes in and comes out.
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import llama_cpp as C
import numpy as np
import numpy.typing as npt
import raw  # noqa: F401 (turns llama.cpp's log off)
from gguf import GGUFValueType, GGUFWriter
from llama_cpp import llama_cpp as _binding

Tensor = npt.NDArray[np.float32]
Vocab = Literal["none", "bpe"]
Kind = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"]
Settings = Mapping[str, Any]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_VOCAB = 320
_LLAMA: Settings = {
    "context_length": 512,
    "embedding_length": 128,
    "block_count": 2,
    "feed_forward_length": 192,
    "attention.head_count": 8,
    "attention.head_count_kv": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
"""The models with text, which the engine's tests use."""

_D, _HEADS, _FF, _LAYERS = 128, 2, 192, 2
_ANY: Settings = {
    "context_length": 256,
    "embedding_length": _D,
    "block_count": _LAYERS,
    "feed_forward_length": _FF,
    "attention.head_count": _HEADS,
    "attention.head_count_kv": _HEADS,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.group_norm_epsilon": 1e-5,
    "attention.group_norm_groups": 8,
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 1.0,
    "attention.relative_buckets_count": 8,
    "attention.sliding_window": 32,
    "attention.sliding_window_pattern": 2,
    "attention.decay_lora_rank": 16,
    "attention.iclr_lora_rank": 16,
    "attention.value_residual_mix_lora_rank": 16,
    "attention.gate_lora_rank": 16,
    "rope.dimension_sections": [_D // _HEADS // 4] * 4,
    "leading_dense_block_count": 1,
    "full_attention_interval": 2,
    "use_parallel_residual": False,
    "residual_scale": 1.0,
    "rescale_every_n_layers": 6,
    "time_mix_extra_dim": 16,
    "time_decay_extra_dim": 32,
    "token_shift_count": 2,
    "shortconv.l_cache": 3,
    "wkv.head_size": 64,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 2 * _D,
    "ssm.state_size": 128,
    "ssm.time_step_rank": _HEADS,
    "ssm.group_count": 2,
    "expert_feed_forward_length": _FF,
    "expert_shared_feed_forward_length": _FF // 2,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "expert_group_scale": 1.0,
    "experts_per_group": 1,
    "expert_weights_scale": 1.0,
    "expert_weights_norm": True,
    "interleave_moe_layer_step": 2,
}
"""What most architectures need to be made up; an architecture reads its own keys and leaves the rest."""

_MLA: Settings = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 64,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 32,
    "rope.dimension_count": 32,
}
_INDEXER: Settings = {
    "attention.indexer.head_count": 64,
    "attention.indexer.key_length": 128,
    "attention.indexer.top_k": 131072,
    "attention.indexer.block_size": 4,
    "attention.indexer.local_blocks": 1,
    "attention.indexer.kpool": 4,
    "attention.indexer.kpool_select_tail": True,
}
_HYPER: Settings = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.low_rank": 8,
    "hyper_connection.magnitude": 2.0,
}
_KDA: Settings = {
    "attention.head_count": [1, 0],
    "attention.head_count_kv": [1, 0],
    "kda.head_dim": 128,
    "kda.safe_gate": True,
    "kda.gate_lower_bound": -5.0,
}
_PATTERN: Settings = {"attention.sliding_window_pattern": [0, 1], "rope.freq_base_swa": 10000.0}
_HYBRID: Settings = {"attention.head_count": [_HEADS, 0], "attention.head_count_kv": [_HEADS, 0]}
_NEMOTRON: Settings = {
    "block_count": 3,
    "attention.head_count": [_HEADS, 0, _HEADS],
    "attention.head_count_kv": [_HEADS, 0, _HEADS],
    "feed_forward_length": [0, 0, _FF],
}
_SWA_MLA: Settings = {
    "attention.kv_lora_rank_swa": 64,
    "attention.key_length_swa": 96,
    "attention.value_length_swa": 64,
    "attention.key_length_mla_swa": 64,
    "attention.value_length_mla_swa": 32,
}
_PLE: Settings = {
    "ple.layers": [0],
    "ple.ngram_size": 3,
    "ple.heads_per_ngram": 2,
    "ple.conv_kernel": 4,
    "ple.eos_token_id": 0,
    "embedding_length_per_layer_input": _D // 4,
    "ple.layer_multipliers": [1, 3, 5],
    "ple.head_offsets": [0, _VOCAB, 2 * _VOCAB, 3 * _VOCAB],
    "ple.head_vocab_sizes": [_VOCAB] * 4,
}
_DEEPSEEK4: Settings = (
    _HYPER
    | _INDEXER
    | {
        "block_count": 4,
        "attention.head_count": 8,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 64,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 32,
        "attention.output_group_count": 8,
        "attention.output_lora_rank": 32,
        "attention.compress_ratios": [0, 0, 4, 128],
        "attention.compress_rope_freq_base": 160000.0,
        "hash_layer_count": 0,
        "swiglu_clamp_exp": 10.0,
        "expert_gating_func": 4,
    }
)
_SCALED: Settings = {"logit_scale": 0.5}
_DENSE: Settings = {"expert_count": 0, "expert_used_count": 0}

ARCHITECTURES: dict[str, Settings] = {
    "apertus": {f"xielu.{key}": 1.0 for key in ("alpha_n", "alpha_p", "beta", "eps")},
    "arwkv7": {"token_shift_count": 1},
    "bailingmoe3": _MLA
    | _KDA
    | {"swiglu_clamp_exp": [0.0, 4.0], "swiglu_clamp_shexp": [0.0, 5.0], "rope.dimension_sections": [4, 6, 6, 0]},
    "cohere2": _SCALED,
    "cohere2moe": _PATTERN | _SCALED,
    "command-r": _SCALED,
    "deepseek2": _MLA,
    "deepseek32": _MLA | _INDEXER,
    "deepseek4": _DEEPSEEK4,
    "dots3note": _MLA | _INDEXER | _PATTERN | _SWA_MLA | {"attention.indexer.types": [1, 0]},
    "glm-dsa": _MLA | _INDEXER,
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma4": _PATTERN
    | {
        "embedding_length_per_layer_input": 64,
        "attention.shared_kv_layers": 0,
        "attention.key_length_swa": 64,
        "attention.value_length_swa": 64,
    },
    "glm5-next": _MLA
    | _KDA
    | _INDEXER
    | _HYPER
    | {"attention.head_count": 1, "rope.dimension_count": 0, "attention.key_length": 64},
    "granite": _SCALED,
    "granite_swa": _PATTERN | _SCALED,
    "granitemoe": _SCALED,
    "granitehybrid": _HYBRID | _SCALED,
    "grok": {"logit_scale": 1.0},
    "hrm_text": {"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2, "block_count": 6},
    "hy_v4": _MLA | _INDEXER | _HYPER | {"attention.indexer.types": [1, 0], "swiglu_clamp_exp": 10.0},
    "jamba": _HYBRID,
    "kimi-k3": _MLA
    | _KDA
    | {"attn_res.block_size": 12, "activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0},
    "kimi-linear": _MLA | _KDA,
    "lfm2": _HYBRID,
    "lfm2moe": _HYBRID,
    "llama4": {"block_count": 4},
    "maple": _PATTERN | {"swiglu_clamp_exp": 7.0},
    "mimo2": _PATTERN,
    "minicpm": {"logit_scale": 2.0},
    "minicpm3": _MLA | {"attention.key_length": 64, "attention.value_length": 64, "attention.head_count_kv": 2},
    "minimax-m3": _INDEXER | {"attention.indexer.head_count": _HEADS},
    "mistral4": _MLA,
    "muse-glimmer": _PATTERN | _SCALED,
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "plm": _MLA | {"attention.key_length": 64, "attention.value_length": 32, "attention.head_count_kv": 2},
    "qwen4exp": _HYPER | _INDEXER | {"attention.compress_ratios": [4, 4], "attention.indexer.key_length": 64} | _PLE,
    "spark2_5": _PATTERN,
    "step35": _PATTERN,
    "talkie": _SCALED,
}
"""What an architecture needs beside ``_ANY``."""


GENERATORS: Sequence[str] = """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bitnet bloom chatglm codeshell
    cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 dots1
    dots3note ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma2 gemma3 gemma3n
    gemma4 glm-dsa glm4 glm4moe glm5-next gpt-oss gpt2 gptneox granite granite_swa granitehybrid granitemoe grok
    grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2 jamba kimi-k3
    kimi-linear laguna lfm2 lfm2moe llama llama4 maincoder mamba mamba2 maple mellum mimo2 minicpm minicpm3
    minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 mpt muse-glimmer nanbeige nemotron nemotron_h
    nemotron_h_moe olmo olmo2 olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo3
    pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3vl qwen3vlmoe qwen4exp
    refact rwkv6 rwkv7 seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35 t5 talkie
    xverse
""".split()  # noqa: SIM905
"""The architectures that can be made up and that generate text, in several sequences."""

REFUSED: Sequence[str] = ("eurobert", "gemma-embedding", "llama-embed", "modern-bert", "neo-bert", "t5encoder")
"""Those without an output matrix."""


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


_SET_DATA = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


def _functions() -> Any:
    """The functions of llama.cpp that the binding does not declare."""
    lib: Any = _binding._lib
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    lib.gguf_init_from_file.restype, lib.gguf_init_from_file.argtypes = pointer, [text, _InitParams]
    lib.gguf_free.restype, lib.gguf_free.argtypes = None, [pointer]
    lib.ggml_get_name.restype, lib.ggml_get_name.argtypes = text, [pointer]
    lib.ggml_nrows.restype, lib.ggml_nrows.argtypes = ctypes.c_int64, [pointer]
    lib.ggml_n_dims.restype, lib.ggml_n_dims.argtypes = ctypes.c_int, [pointer]
    lib.llama_model_init_from_user.restype = pointer
    lib.llama_model_init_from_user.argtypes = [pointer, _SET_DATA, pointer, C.llama_model_params]
    return lib


def tensor_shapes(metadata: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes (rows first) of all tensors, required or not, of a model with this metadata."""
    lib = _functions()
    shapes: dict[str, tuple[int, ...]] = {}

    @_SET_DATA
    def note(tensor: int, _: Any) -> None:
        sizes = (ctypes.c_int64 * 4).from_address(tensor + 16)  # ggml_tensor::ne
        dims = lib.ggml_n_dims(tensor)
        shapes[lib.ggml_get_name(tensor).decode()] = tuple(int(size) for size in reversed(sizes[:dims]))

    file = lib.gguf_init_from_file(str(metadata).encode(), _InitParams(True, None))
    params = C.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_init_from_user(file, note, None, params)
    lib.gguf_free(file)
    if not model:
        raise RuntimeError(f"llama.cpp makes no model of {metadata.name}")
    C.llama_model_free(model)
    return shapes


def _weights(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Tensor:
    """Norms near 1, matrices that keep the size of what passes through them, small biases."""
    x = rng.standard_normal(shape, np.float32)
    if ("norm" in name and name.endswith("weight")) or name.endswith("scale"):
        return 1 + np.float32(0.1) * x
    if name.endswith("ssm_a"):
        return -np.abs(x)  # a decay
    return x * np.float32(0.1 if len(shape) == 1 else shape[-1] ** -0.5)


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _write_vocab(writer: GGUFWriter, vocab: Vocab, size: int) -> None:
    if vocab == "none":
        writer.add_tokenizer_model("no_vocab")
        return
    tokens, types = _byte_tokens(), [1] * 256
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "t"), ("Ġt", "he"), ("Ġ", "a")]
    tokens += ["".join(pair) for pair in merges]
    types += [1] * len(merges)
    special = len(tokens)
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types += [3, 3, 3]
    tokens += [f"<|unused_{i}|>" for i in range(size - len(tokens))]
    types += [5] * (size - len(types))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(special)
    writer.add_eos_token_id(special + 2)
    writer.add_eot_token_id(special + 2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write(path: Path, arch: str, settings: Settings, vocab: Vocab, tensors: Mapping[str, Tensor]) -> Path:
    writer = GGUFWriter(str(path), arch)
    for key, value in settings.items():
        full = key if key.startswith("xielu.") else f"{arch}.{key}"
        if isinstance(value, list):
            kind = GGUFValueType.FLOAT32 if isinstance(value[0], float) else GGUFValueType.INT32
            kind = GGUFValueType.UINT64 if key.startswith("ple.") and key != "ple.layers" else kind
            writer.add_key_value(full, value, GGUFValueType.ARRAY, sub_type=kind)
            continue
        add: Any = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(full, value)
    _write_vocab(writer, vocab, settings["vocab_size"])
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(source: Path, target: Path, kind: Kind) -> Path:
    """All matrices of a model in ``kind``, as ``llama-quantize --pure --allow-requantize`` does it."""
    params = C.llama_model_quantize_default_params()
    names = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M"}
    params.ftype = getattr(C, "LLAMA_FTYPE_" + names.get(kind, "MOSTLY_" + kind))
    params.pure, params.nthread, params.allow_requantize = True, 1, True
    if C.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp did not quantise {source} to {kind}")
    return target


def whole(settings: Settings) -> Settings:
    """The metadata of an architecture, of which ``settings`` are what differs from most."""
    return _ANY | settings


def write(
    path: Path,
    arch: str,
    settings: Settings | None = None,
    *,
    kind: Kind = "F32",
    tied: bool = False,
    vocab: Vocab = "none",
    seed: int | None = None,
    leave_out: Sequence[str] = (),
) -> Path:
    """A model of the architecture with the given metadata (without the architecture's prefix).

    ``tied``: without an output matrix of its own. ``leave_out``: endings of other tensors to leave out.
    """
    chosen: Settings = {"vocab_size": _VOCAB} | (whole(ARCHITECTURES.get(arch, {})) if settings is None else settings)
    leave_out = [*leave_out, "input_scale", *(["output.weight"] if tied else [])]
    with tempfile.TemporaryDirectory() as folder:
        shapes = tensor_shapes(_write(Path(folder) / f"{arch}.gguf", arch, chosen, vocab, {}))
        rng = np.random.default_rng(zlib.crc32(path.stem.encode()) if seed is None else seed)
        tensors = {
            name: _weights(rng, name, shape)
            for name, shape in shapes.items()
            if not any(name == end or name.endswith("." + end) for end in leave_out)
        }
        if kind == "F32":
            return _write(path, arch, chosen, vocab, tensors)
        return quantize(_write(Path(folder) / "f32.gguf", arch, chosen, vocab, tensors), path, kind)


def write_llama(path: Path, *, kind: Kind = "F32", tied: bool = False, vocab: Vocab = "none", **options: Any) -> Path:
    """A llama with rotary attention, 128 wide, or 256 where a block of the matrices' type is that long."""
    wide = {"embedding_length": 256, "feed_forward_length": 256} if kind in ("Q4_K", "Q6_K") else {}
    settings = {"vocab_size": _VOCAB} | _LLAMA | wide
    settings["rope.dimension_count"] = settings["embedding_length"] // settings["attention.head_count"]
    # Without them it is the plain transformer of the oracle.
    extras = ("bias", "scale", "rope_freqs.weight")
    return write(path, "llama", settings, kind=kind, tied=tied, vocab=vocab, leave_out=extras, **options)


def write_vocab_only(path: Path) -> Path:
    """A tokenizer and a chat template without a single weight."""
    return _write(path, "llama", {"vocab_size": _VOCAB} | _LLAMA, "bpe", {})


def write_large(path: Path, seed: int = 0) -> Path:
    """A llama of 134 million parameters in Q8_0, about 140 MB: for timing only."""
    settings = _LLAMA | {
        "vocab_size": 32_000,
        "context_length": 2048,
        "embedding_length": 768,
        "block_count": 12,
        "feed_forward_length": 2048,
        "attention.head_count": 12,
        "attention.head_count_kv": 12,
        "rope.dimension_count": 64,
    }
    return write(path, "llama", settings, kind="Q8_0", vocab="bpe", seed=seed, leave_out=("bias", "rope_freqs.weight"))


_KINDS: Sequence[Kind] = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
MODELS: dict[str, Callable[..., Path]] = {
    **{f"llama-{kind.lower()}": partial(write_llama, kind=kind) for kind in _KINDS},
    **{f"llama-tied-{kind.lower()}": partial(write_llama, kind=kind, tied=True) for kind in ("F32", "Q8_0", "Q6_K")},
    "qwen3-tied": partial(write, arch="qwen3", tied=True),
    "gemma2-softcap": partial(write, arch="gemma2", tied=True),
    "command-r-scale": partial(write, arch="command-r"),
    "phi2-bias": partial(write, arch="phi2"),
    "qwen3moe": partial(write, arch="qwen3moe"),
    "deepseek2": partial(write, arch="deepseek2"),
    "mamba": partial(write, arch="mamba"),
    "falcon-h1": partial(write, arch="falcon-h1"),
}
"""The kinds of output heads and of memory, for the tests that go through everything."""

EVERYTHING: Sequence[str] = [*MODELS, *(name for name in GENERATORS if name not in MODELS)]
"""All that takes a control."""


def write_models(folder: Path, names: Sequence[str] = tuple(MODELS)) -> dict[str, Path]:
    """Write the named models into ``folder``; the seed of each follows from its name."""
    return {name: MODELS[name](folder / f"{name}.gguf") for name in names}


def write_architecture(folder: Path, name: str) -> Path:
    """A model of ``MODELS`` or of the architecture of that name."""
    path = folder / f"{name}.gguf"
    return MODELS[name](path) if name in MODELS else write(path, name)


def cached_large() -> Path:
    """``write_large`` in the cache: written once for each version of this file."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    path = cache_dir() / f"large-{digest}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        write_large(part).rename(path)
    return path


def cache_dir() -> Path:
    """Where benchmarks keep what is slow to make."""
    path = Path(tempfile.gettempdir()) / "aisp-local-benchmarks"
    path.mkdir(exist_ok=True)
    return path
