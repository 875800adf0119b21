"""Which implementation runs an operation, and why. A leaf: imports no triton until it is asked about it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from contextlib import AbstractContextManager

import torch

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
TRITON_OPS = (
    "linear_topk",
    "linear_gather",
    "linear_logsumexp",
    "topk_distill_loss",
    "topk_distill_loss/lse",
    "linear_cross_entropy",
)
# Which way is faster for these depends on the GPU: `auto` waits for a measurement.
UNMEASURED_TRITON_OPS = ("linear_topk", "linear_logsumexp", "topk_distill_loss/lse", "linear_cross_entropy")


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits live: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_dtypes(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: a room that chose its dtypes gets them, also inside a caller's `torch.autocast`."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _why_no_triton(op: str, device: torch.device) -> str | None:
    """The sentence that says why the Triton kernel of `op` cannot run on `device`, or None when it can."""
    if op not in TRITON_OPS:
        return f"{op} has no Triton kernel yet (there are: {', '.join(TRITON_OPS)})"
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton kernels need a CUDA device (or TRITON_INTERPRET=1 for tests), the tensors are on {device}"


def resolve_impl(
    op: str, device: torch.device | str, dtype: torch.dtype = torch.float32, impl: str = "auto"
) -> tuple[str, str]:
    """Which implementation of `op` runs for tensors of `dtype` on `device`, and the reason in a sentence.

    Args:
        op: a public function's name; `"topk_distill_loss/lse"` for its normalizations `tail`, `zeroed` and
            `truncated`.
        device, dtype: of the hidden states.
        impl: `auto`, or an explicit choice, which is returned if it can run.

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
    obstacle = _why_no_triton(op, device)
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
    if op in UNMEASURED_TRITON_OPS:
        return "chunked", "its Triton kernel has not been measured on a GPU yet; impl='triton' runs it"
    return "triton", f"fused kernel on {device.type}"
