"""ONNX Runtime: which provider runs a model, and with which threads."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisp_local.errors import AispError, RewardError
from aisp_local.host import available_cores

# The first ONNX Runtime known to take a duration of spinning: earlier ones would spin for long.
_SHORT_SPIN = (1, 31)


def _has_gpu() -> bool:
    """Whether an NVIDIA driver is there."""
    return os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi") is not None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


@dataclass(frozen=True)
class RuntimeBuild:
    """ONNX Runtime, the providers that it was built with, the one that rewards run on, and why that is not CUDA."""

    version: str
    providers: tuple[str, ...]
    used: str
    why: str  # empty if it is


def describe_runtime() -> RuntimeBuild:
    """Raises AispError where it does not load."""
    ort = _runtime()
    providers = tuple(ort.get_available_providers())
    why = ""
    if not _has_gpu():
        why = "there is no NVIDIA driver"
    elif "CUDAExecutionProvider" not in providers:
        why = "this build has no CUDA: pip install onnxruntime-gpu"
    elif (missing := _missing_cuda(ort)) is not None:
        why = f"it lacks the CUDA libraries ({missing}): pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return RuntimeBuild(str(ort.__version__), providers, "CPU" if why else "CUDA", why)


def _providers(ort: Any) -> list[str]:
    """CUDA where it can run, else the CPU, with a warning where only a library is missing."""
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not _has_gpu():
        return ["CPUExecutionProvider"]
    missing = _missing_cuda(ort)
    if missing is None:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    warnings.warn(
        f"there is an NVIDIA driver, but ONNX Runtime lacks the CUDA libraries ({missing}): the reward runs on the "
        "CPU; pip install 'onnxruntime-gpu[cuda,cudnn]' brings them",
        stacklevel=2,
    )
    return ["CPUExecutionProvider"]


def _missing_cuda(ort: Any) -> str | None:
    """Why ONNX Runtime's CUDA part does not load, None if it does. ONNX Runtime itself would fill the screen."""
    if hasattr(ort, "preload_dlls"):  # those that pip installed; it prints what it does not find
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    folder = Path(ort.__file__).parent / "capi"
    prefix, suffix = ("", ".dll") if os.name == "nt" else ("lib", ".so")
    try:
        for part in ("shared", "cuda"):
            ctypes.CDLL(str(folder / f"{prefix}onnxruntime_providers_{part}{suffix}"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error).replace(f"{folder}{os.sep}", "")
    return None


def _runtime() -> Any:
    """The module. Raises AispError where it does not load."""
    # Its official builds report to Microsoft unless told otherwise: the variable counts before the first import, in
    # which it makes files and a device id; the call silences a runtime that somebody else has imported already.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise AispError(f"ONNX Runtime does not load ({error}); install it with: pip install onnxruntime") from error
    ort.disable_telemetry_events()
    return ort


def open_session(model: Path, providers: Sequence[str] | None, threads: int | None) -> Any:
    """A session on the given providers (default: CUDA where it can run) with so many threads (default: one a core).

    Raises RewardError.
    """
    ort = _runtime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Without a number ONNX Runtime starts a thread for every core of the machine and binds each to one of them, also
    # where a container or taskset leaves this process others, or fewer.
    options.intra_op_num_threads = available_cores() if threads is None else threads
    # Spinning threads would take the cores that decode; for so short a time as another thread needs to follow, they
    # save a wake-up in every operator.
    short = _version(ort.__version__) >= _SHORT_SPIN
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if short else "0")
    if short:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    if providers is None:
        providers = _providers(ort)
    try:
        return ort.InferenceSession(str(model), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime raises its own kinds, all of them plain exceptions
        reason = str(error).splitlines()[0][:200]
        raise RewardError(f"{model} cannot be loaded by ONNX Runtime ({reason}); restore it") from error
