"""What the public functions compute, on flattened and checked inputs: by the definition, or by one custom op each.

primitives   linear_topk, linear_gather, linear_logsumexp, token_stats
losses       topk_loss, topk_stats with teacher_mass and overlap, dense_loss, cross_entropy
op           how an op is registered, and what stands for an absent gradient

A custom op is where autograd, torch.compile and the implementations meet. It takes plain tensors and numbers; its last
argument names the implementation (`chunked` or `triton`); its fake kernel gives shapes to torch.compile. Absent results
are empty tensors, because an op cannot return None.
"""

from .losses import cross_entropy, dense_loss, met_before, overlap, teacher_mass, topk_loss, topk_stats
from .primitives import linear_gather, linear_logsumexp, linear_topk, token_stats
