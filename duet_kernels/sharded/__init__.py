"""What `ops` computes, for a head whose rows lie on the ranks of a group: each runs the local operation, then all merge.

The functions have the names and arguments of those in `ops`, ids are those of the whole vocabulary, and results are the same on
every rank. With l_r the log-sum-exp over the ids of rank r, L = log sum exp l_r and w_r = exp(l_r - L) its share:

    top-k            k of each rank, gathered; the K first by (value, id); what is passed over joins the tail
    gather           each logit from the rank that has its id: a sum with zeros
    log-sum-exp      L
    entropy          H = sum_r w_r (H_r - log w_r)                   variance = sum_r w_r (Var_r + (mu_r - mu)^2)
    losses at k ids  the pair (tail, logits at the ids) of all ranks, then as in one process
    dense            each rank compares its own ids, normalised over all; sums over ids are summed over the ranks

Sent forward: O(N K) or O(N) elements from each rank. Backward: dh, N D, summed over the ranks in fp32 (fp64). Never O(N V).

Before anything else the ranks compare what they are about to compute, and a few projections of the tensors that have to be the
same on all of them (`part.agree`): 32 numbers and, on a GPU, one synchronisation a call.

part     this rank's part of a head; do all ranks compute the same?
merge    local results of all ranks become those of the whole vocabulary
dense    dense divergences

Legend: N tokens, D hidden size, V vocabulary, K ids of a token, R ranks, T temperature.
"""

from .dense import dense_loss
from .merge import (
    cross_entropy,
    linear_gather,
    linear_logsumexp,
    linear_topk,
    overlap,
    token_stats,
    topk_loss,
    topk_stats,
)
