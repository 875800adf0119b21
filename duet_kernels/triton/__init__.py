"""The Triton kernels: one file a family, from top to bottom a formula, its kernels and their launchers.

The functions below have the signatures of those in `duet_kernels.portable`. Importing this package imports triton, so
`ops` does it when a kernel is first wanted. They take checked, flattened tensors, inside of `launching`;
`times_rows` and `times_upstream` run in a backward pass, where autograd has made the gradient's device the current one.
"""

from .complement import (
    complement_and_values,
    complement_and_values_backward,
    linear_cross_entropy,
    topk_loss_with_tail,
)
from .dense import times_rows, times_upstream
from .divergence import linear_divergence
from .gather import linear_gather, linear_gather_backward
from .gather_loss import topk_loss
from .primitives import launching
from .stats import token_stats
from .topk import linear_topk
from .topk_divergence import topk_divergence as divergence_and_gradient
