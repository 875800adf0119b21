"""Losses over the vocabulary from hidden states and the LM head, without ever storing full logits."""

from .dispatch import resolve_impl, set_workspace_bytes
from .functional import (
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    topk_distill_loss,
    topk_distill_stats,
)
from .head import LMHead, TopK
from .modules import LinearCrossEntropyLoss, LinearDistillLoss, TopKDistillLoss

__all__ = [
    "LMHead",
    "LinearCrossEntropyLoss",
    "LinearDistillLoss",
    "TopK",
    "TopKDistillLoss",
    "linear_cross_entropy",
    "linear_distill_loss",
    "linear_gather",
    "linear_logsumexp",
    "linear_token_stats",
    "linear_topk",
    "resolve_impl",
    "set_workspace_bytes",
    "topk_distill_loss",
    "topk_distill_stats",
]
