"""One custom op a primitive: the seam between autograd, torch.compile and the implementations. No maths.

logits   ops of hidden states and a head: linear_topk, linear_gather, complement_and_values, token_stats
losses   topk_divergence of logits at K ids; linear_divergence and linear_cross_entropy of hidden states
op       how an op is registered, and what stands for an absent gradient

Every op takes plain tensors and numbers, its last argument names the implementation (`chunked` or `triton`), its
fake kernel gives shapes for torch.compile, and its backward pass is an op again. Nothing saved is ever written;
absent results are empty tensors, because an op cannot return None. Triton is imported when a kernel is first run.
"""

from .logits import (
    complement_and_values,
    complement_and_values_backward,
    linear_gather,
    linear_gather_backward,
    linear_topk,
    token_stats,
)
from .losses import linear_cross_entropy, linear_divergence, topk_divergence

__all__ = [
    "complement_and_values",
    "complement_and_values_backward",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_gather",
    "linear_gather_backward",
    "linear_topk",
    "token_stats",
    "topk_divergence",
]
