"""Portable low-memory torch: what a CPU runs, and every device without a Triton kernel. Never imports triton.

The functions below have the signatures of those in `duet_kernels.triton`. They take checked, flattened tensors, write
none of their inputs, and hold no `[N, V]` logits. fp64 is kept; everything else is computed in fp32.
"""

from .dense import linear_cross_entropy, linear_divergence, times_rows, times_upstream
from .gather import linear_gather, linear_gather_backward, topk_loss
from .logsumexp import (
    complement_and_values,
    complement_and_values_backward,
    token_stats,
    topk_loss_with_tail,
)
from .topk import linear_topk
from .topk_divergence import divergence_and_gradient

__all__ = [
    "complement_and_values",
    "complement_and_values_backward",
    "divergence_and_gradient",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_gather",
    "linear_gather_backward",
    "linear_topk",
    "times_rows",
    "times_upstream",
    "token_stats",
    "topk_loss",
    "topk_loss_with_tail",
]
