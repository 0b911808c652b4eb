"""llama-cpp-python's own tests and examples, with its ``Llama`` and with ``AlignedLlama`` in its place.

    python benchmarks/drop_in.py

Downloads the pinned sdist, unless it is there (patches/pin.toml), and runs three times what it holds of the high-level
interface: with ``llama_cpp.Llama``, with ``AlignedLlama(budget=1)``, the model alone, and with a search of four
rollouts (``budget=4``), whose texts need not be those that a test expects. The models that tests and examples would
download are not there: the shipped storyteller and small random models stand in, so that a test which expects a certain
sentence fails for all three. Needs pytest, scipy and huggingface-hub. Exit code 1 if ``AlignedLlama(budget=1)`` fails
where ``Llama`` does not and no reason is known.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "patches"), str(ROOT / "tests")]

KINDS = {"Llama": None, "AlignedLlama, budget 1": 1, "AlignedLlama, budget 4": 4}

LOW = "of the low-level interface (eval, generate, states, caches), which is llama_cpp.Llama's"
REASONS = {
    "test_real_llama": LOW,
    "test_exact_cached_prompt_reuse_matches_fresh": LOW,
    "test_loaded_exact_cached_prompt_reuse_matches_fresh": LOW,
    "test_ram_cache_exact_prompt_hit_matches_fresh": LOW,
    "test_shorter_prompt_prefix_reuse_matches_fresh": LOW,
    "test_real_llama_embeddings": "embeddings",
    "high_level_api_embedding.py": "embeddings",
    "high_level_api_infill.py": "suffix",
}
"""Why something is not AlignedLlama's to pass."""

CONFTEST = """
import functools, os, sys
import huggingface_hub, llama_cpp
import pytest

def local(repo_id, filename, **_):
    kinds = {"tinyllama": "TRANSFORMER", "Qwen3.5-0": "TRANSFORMER", "mamba-130": "RECURRENT", "Falcon-H1": "HYBRID"}
    path = os.environ["DROP_IN_" + kinds.get(filename[:9], "NONE")]
    return path or pytest.skip("no such model here")

huggingface_hub.hf_hub_download = local
class Files:
    def ls(self, repo, recursive):
        return [f"{repo}/Qwen3.5-0.8B-Q8_0.gguf"]
huggingface_hub.HfFileSystem = Files
stock = llama_cpp.Llama
if os.environ["DROP_IN_BUDGET"]:
    from aisp_local import AlignedLlama
    class Llama(AlignedLlama):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, budget=int(os.environ["DROP_IN_BUDGET"]), **kwargs)
    llama_cpp.Llama = Llama
"""


def vocabulary(path: Path) -> None:
    """Add small random weights to a file that has a tokenizer only."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader, d = GGUFReader(path), 32
    writer = GGUFWriter(str(path) + ".whole", "llama")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kind, inner = field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    sizes = {"context_length": 512, "embedding_length": d, "block_count": 1, "feed_forward_length": d}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": d // 2}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    rng, words = np.random.default_rng(0), len(reader.fields["tokenizer.ggml.tokens"].data)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (words, d), "output": (words, d), "output_norm": (d,)}
    shapes |= {f"blk.0.{name}": (d, d) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (d, d) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (d,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(str(path) + ".whole", path)


def sdist(folder: Path) -> Path:
    from aisp_build.source import fetch, read_pin, unpack

    pin = read_pin(ROOT / "patches" / "pin.toml")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aisp-local" / "sdists"
    return unpack(fetch(pin, cache, os.environ.get("AISP_LLAMA_SDIST")), folder)


def examples(tree: Path, model: Path) -> dict[str, str]:
    """Programs of the high-level interface: those of the README, and files that need nothing but the package."""
    found = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (tree / "README.md").read_text(), re.S), 1):
        # The others show a response, load other models and projectors, or call llama.cpp's own functions.
        if "Llama(" in block and not re.search(r"clip_model|draft_model|embedding|ctypes", block) and "import" in block:
            found[f"README, block {number}"] = re.sub(r'model_path="[^"]*"', f"model_path={str(model)!r}", block)
    for path in sorted((tree / "examples" / "high_level_api").glob("high_level*.py")):
        found[path.name] = f"import sys; sys.argv[1:] = ['-m', {str(model)!r}]\n" + path.read_text()
    pull = (tree / "examples" / "hf_pull" / "main.py").read_text()
    found["hf_pull/main.py"] = re.sub(r"    tokenizer=.*?\n    \),\n", "", pull, flags=re.S)
    return found


def run(tree: Path, environment: dict[str, str]) -> dict[str, tuple[str, str]]:
    """What became of each, and why."""
    outcomes: dict[str, tuple[str, str]] = {}
    report = tree / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "tests", f"--junitxml={report}", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if not report.exists():
        raise SystemExit(f"pytest did not run: {done.stdout}{done.stderr}")
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        said = bad[0].get("message", "").splitlines()[:1] if bad else []
        outcomes[case.get("name", "")] = (bad[0].tag if bad else "passed", "".join(said))
    for name, code in examples(tree, Path(environment["DROP_IN_TRANSFORMER"])).items():
        program = f"exec({CONFTEST!r})\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        said = done.stderr.strip().splitlines()[-1:]
        outcomes[name] = ("passed", "") if done.returncode == 0 else ("failure", "".join(said))
    return outcomes


def main() -> int:
    import synthetic

    from aisp_local import shipped

    with tempfile.TemporaryDirectory(prefix="aisp-drop-in-") as scratch:
        tree = sdist(Path(scratch))
        shutil.rmtree(tree / "llama_cpp")  # the installed one is what is tested
        (tree / "tests" / "conftest.py").write_text(CONFTEST)
        vocabulary(tree / "vendor" / "llama.cpp" / "models" / "ggml-vocab-llama-spm.gguf")
        test = tree / "tests" / "test_llama.py"
        # Attributes that are Llama's own business.
        private = r"^ *assert \w+\._(ctx\.ctx|is_recurrent|is_hybrid) is .*\n"
        test.write_text(re.sub(private, "", test.read_text(), flags=re.M))
        models: dict[str, Any] = {"TRANSFORMER": shipped.model(), "NONE": ""}
        models |= {"RECURRENT": synthetic.write(Path(scratch) / "mamba.gguf", "mamba", vocab="bpe")}
        models |= {"HYBRID": synthetic.write(Path(scratch) / "hybrid.gguf", "falcon-h1", vocab="bpe")}
        environment = os.environ | {f"DROP_IN_{name}": str(path) for name, path in models.items()}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        found = {name: run(tree, environment | {"DROP_IN_BUDGET": str(budget or "")}) for name, budget in KINDS.items()}
    print(f"| | {' | '.join(KINDS)} | |\n|---|{'---|' * len(KINDS)}---|")
    stock, alone = found["Llama"], found["AlignedLlama, budget 1"]
    unknown = 0
    for name in stock:
        reason = REASONS.get(name.split("[")[0], "") if alone[name][0] != "passed" else ""
        if not reason and alone[name][0] != stock[name][0] == "passed":
            unknown += 1
            reason = alone[name][1]
        print(f"| {name} | {' | '.join(found[kind][name][0] for kind in KINDS)} | {reason} |")
    for kind in KINDS:
        print(f"{kind}: {sum(outcome == 'passed' for outcome, _ in found[kind].values())} of {len(stock)} passed")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
