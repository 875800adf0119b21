"""What a device gets: an implementation of each operation, and why; dtypes and products of halves; bytes of workspace.

Imports no triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

from . import measured

Impl = Literal["auto", "triton", "chunked", "reference"]
Choice = Literal["triton", "chunked", "reference"]
IMPLS: tuple[Impl, ...] = get_args(Impl)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # looks for it, imports nothing
# "topk_distill_loss/lse" are its forms that need a log-sum-exp of the student: all but raw logits and `renormalize`.
OPS = (
    "linear_topk",
    "linear_gather",
    "linear_logsumexp",
    "topk_distill_loss",
    "topk_distill_loss/lse",
    "linear_distill_loss",
    "linear_cross_entropy",
    "linear_token_stats",
)
LEAST_ARCH = 80  # Triton compiles for sm_80 and newer
MAX_SLOTS = 8192  # of `topk_distill_loss`'s kernel: `tiles.MAX_SLOTS`, known here without triton

# The most: with it the losses with a trainable head of 128256 x 4096 need not multiply logits twice.
LEAST_BYTES, MOST_BYTES = 256 * 2**20, 9 * 2**28
_set: int | None = None

# --- dtypes ------------------------------------------------------------------------------------------------------


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits live: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients made before the upstream factor is known: fp32 for fp16, whose range a loss scale needs."""
    return torch.float32 if dtype == torch.float16 else dtype


def exact_dtypes(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: a room that chose its dtypes gets them, also inside a caller's `torch.autocast`."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


# --- what a device can do ----------------------------------------------------------------------------------------


def architecture(device: torch.device) -> int:
    """Compute capability as one number (90 for sm_90); 0 on anything but an NVIDIA GPU that is there."""
    if device.type != "cuda" or on_rocm() or not torch.cuda.is_available():
        return 0
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


def on_rocm() -> bool:
    """Whether "cuda" devices of this torch are AMD's."""
    return torch.version.hip is not None


def half_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library of `device` multiplies operands of `dtype`, a half, and returns the sums in fp32.

    cuBLAS does, with bf16 from sm_80 on. Not every rocBLAS in use does.
    """
    if dtype not in HALVES or device.type != "cuda" or on_rocm():
        return False
    return dtype == torch.float16 or architecture(device) >= 80


# --- bytes beyond inputs and outputs -------------------------------------------------------------------------------


def set_workspace_bytes(num_bytes: int | None) -> int | None:
    """Set the bytes that a call may use beyond its inputs and outputs, for this process and every device.

    Without a setting it is 256 MiB on a CPU, and on a CUDA device a 32nd of its memory, at least 256 MiB and at most
    2.25 GiB (of a card of 80 GB and more).

    Args:
        num_bytes: at least 1 MiB, or None for the default of each device.

    Returns:
        The previous setting, so that it can be put back: bytes, or None where nothing was set.

    Raises:
        ValueError: `num_bytes` is not an integer of at least 1 MiB.

    Example:
        >>> previous = set_workspace_bytes(64 * 2**20)
        >>> set_workspace_bytes(previous) == 64 * 2**20
        True
    """
    global _set
    wrong = isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 2**20
    if num_bytes is not None and wrong:
        raise ValueError(
            f"num_bytes: wanted an integer of at least {2**20} (1 MiB) or None, got {num_bytes!r}"
        )
    previous, _set = _set, num_bytes
    return previous


def workspace_bytes(device: torch.device | None = None) -> int:
    """The bytes that a call on `device` may use; None stands for a CPU."""
    if _set is not None:
        return _set
    if device is None or device.type != "cuda":
        return LEAST_BYTES
    return share_of(_total_memory(device.index))


def share_of(total_memory: int) -> int:
    """The default on a CUDA device with so many bytes of memory."""
    return min(max(total_memory // 32, LEAST_BYTES), MOST_BYTES)


@functools.lru_cache
def _total_memory(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).total_memory


# --- which implementation, and why ---------------------------------------------------------------------------------


def _obstacle(op: str, device: torch.device, k: int | None, interpreted: bool) -> str | None:
    """The sentence that says why no Triton kernel can run a call of `op` on `device`, or None when one can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if op.startswith("topk_distill_loss") and k is not None and k > MAX_SLOTS:
        return f"its kernel holds the k ids of a token in registers, at most {MAX_SLOTS}, and there are {k}"
    if interpreted:
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device (or TRITON_INTERPRET=1 for tests), the tensors are on {device}"
    if on_rocm():
        return None
    arch = architecture(device)
    if arch == 0:
        return "this torch sees no CUDA device"
    return None if arch >= LEAST_ARCH else f"Triton needs sm_{LEAST_ARCH} or newer, this GPU is sm_{arch}"


def resolve_impl(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
    *,
    tokens: int | None = None,
    k: int | None = None,
) -> tuple[Choice, str]:
    """Which implementation of `op` runs for tensors of `dtype` on `device`, and the reason in a sentence.

    `auto` takes `triton` on an NVIDIA GPU of sm_80 or newer where triton is installed, but for exceptions that were
    measured, and `chunked` everywhere else. On ROCm the kernels were never run: `impl="triton"` tries them.

    Args:
        op: a public function's name; `"topk_distill_loss/lse"` for its normalizations other than `renormalize`.
        device: of the hidden states.
        dtype: of the hidden states.
        impl: `auto`, or an explicit choice, which is returned if it can run.
        tokens: of the call, for the exceptions of `auto`; None stands for many.
        k: likewise; None stands for a large one. The kernel of `topk_distill_loss` ends at k = 8192.

    Returns:
        `(choice, reason)` with choice one of `triton`, `chunked`, `reference`.

    Raises:
        ValueError: unknown `op`, `impl` or `dtype`.
        RuntimeError: an explicit `impl` that cannot run; nothing else is run in its place.

    Example:
        >>> resolve_impl("linear_topk", "cpu")[0]
        'chunked'
    """
    if op not in OPS:
        raise ValueError(f"op: wanted one of {', '.join(OPS)}, got {op!r}")
    if impl not in IMPLS:
        raise ValueError(f"impl: wanted one of {', '.join(IMPLS)}, got {impl!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: wanted one of {', '.join(map(str, DTYPES))}, got {dtype}")
    device = torch.device(device)
    if impl == "chunked" or impl == "reference":
        return impl, "asked for"
    if impl == "auto" and device.type != "cuda":
        return "chunked", f"portable low-memory torch runs on {device.type}"
    interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    obstacle = _obstacle(op, device, k, interpreted)
    if impl == "triton":
        if obstacle is not None:
            raise RuntimeError(
                f"impl='triton' cannot run {op}: {obstacle}. Use impl='auto' or impl='chunked'"
            )
        return "triton", "asked for"
    if obstacle is not None:
        return "chunked", obstacle
    if on_rocm():
        return "chunked", "the Triton kernels were never run on ROCm; impl='triton' tries them"
    arch = architecture(device)
    for exception in measured.MEASURED.exceptions:
        same = (exception.op, exception.arch, exception.itemsize) == (op, arch, dtype.itemsize)
        if same and exception.takes(tokens, k):
            return "chunked", exception.reason
    return "triton", f"its Triton kernel is the fast way on sm_{arch}"


def described(device: torch.device | str) -> tuple[list[tuple[str, str, str]], int]:
    """([(operation, what `auto` runs for bf16, why)], bytes of workspace) on a device, for a command that prints them.

    An operation that runs otherwise with few tokens has a second row.
    """
    rows = []
    for op in OPS:
        many, few = (resolve_impl(op, device, torch.bfloat16, tokens=tokens) for tokens in (None, 64))
        rows.append((op, *many))
        if few[0] != many[0]:
            rows.append((f"{op}, 64 tokens", *few))
    return rows, workspace_bytes(torch.device(device))
