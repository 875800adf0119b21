"""Which implementation runs an operation, and why. Imports no triton until it is asked about it.

On a GPU `auto` follows what was measured on that architecture (`measured`); where nothing was, it runs the sparse
kernels, which read K rows where anything else reads V, and leaves to `chunked` what competes with library products.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from contextlib import AbstractContextManager

import torch

from . import measured

IMPLS = ("auto", "triton", "chunked", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # looks for it, imports nothing
# "topk_distill_loss/lse" are its forms that need a log-sum-exp of the student: tail, zeroed, truncated.
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
# Their kernels read K rows of the head where anything else reads V. Which way is faster for the others depends on the
# GPU: there `auto` takes the kernel where a measurement says so.
SPARSE_OPS = ("linear_gather", "topk_distill_loss")
MAX_SLOTS = 8192  # of `topk_distill_loss`'s kernel: `tiles.MAX_SLOTS`, known here without triton


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


def _why_no_triton(op: str, device: torch.device, k: int | None) -> str | None:
    """The sentence that says why the Triton kernel of `op` cannot run on `device`, or None when it can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if op.startswith("topk_distill_loss") and k is not None and k > MAX_SLOTS:
        return f"its kernel holds the k ids of a token in registers, at most {MAX_SLOTS}, and there are {k}"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton kernels need a CUDA device (or TRITON_INTERPRET=1 for tests), the tensors are on {device}"


def architecture(device: torch.device) -> int:
    """Compute capability as one number (90 for sm_90); 0 on anything but an NVIDIA GPU that is there."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


def resolve_impl(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
    *,
    tokens: int | None = None,
    k: int | None = None,
) -> tuple[str, str]:
    """Which implementation of `op` runs for tensors of `dtype` on `device`, and the reason in a sentence.

    Args:
        op: a public function's name; `"topk_distill_loss/lse"` for its normalizations `tail`, `zeroed` and
            `truncated`.
        device, dtype: of the hidden states.
        impl: `auto`, or an explicit choice, which is returned if it can run.
        tokens, k: of the call, for `auto`; None stands for large ones. The kernel of `topk_distill_loss` ends at
            k = 8192.

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
    if impl in ("chunked", "reference"):
        return impl, "asked for"
    obstacle = _why_no_triton(op, device, k)
    if impl == "triton":
        if obstacle is not None:
            raise RuntimeError(
                f"impl='triton' cannot run {op}: {obstacle}. Use impl='auto' or impl='chunked'"
            )
        return "triton", "asked for"
    if device.type != "cuda":
        return "chunked", f"portable low-memory torch is the fast way on {device.type}"
    if obstacle is not None:
        return "chunked", obstacle
    arch = architecture(device)
    for choice in measured.MEASURED.choices:
        same = (choice.op, choice.arch, choice.itemsize) == (op, arch, dtype.itemsize)
        if same and choice.takes(tokens, k):
            return choice.impl, choice.reason
    chip = f"sm_{arch}" if arch else "a GPU"
    if op not in SPARSE_OPS:
        why = f"its Triton kernel has not been measured on {chip}: `make tune` does; impl='triton' runs it"
        return "chunked", why
    return "triton", f"reads only the selected rows of the head (not measured on {chip}: `make tune` does)"
