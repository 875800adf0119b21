"""Teacher-forced numbers of given answers: (prompt ids, answer ids) -> one value per answer token.

    log p_t        log-probability of the answer's token
    H_t, Var_t     entropy and variance of the log-probability of that position's distribution
    hit_t          is the token the argmax?
    above_t        how many ids have a larger logit: 0 at the top; below_t: a smaller one: 0 at the bottom

All are computed from hidden states and the LM head, tile by tile; logits of a batch are never stored.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from duet_kernels import LMHead, linear_gather, linear_logsumexp, linear_token_stats, linear_topk

from ..data.dataset import Collator, plain_item
from ..model.lm import head_inputs
from ..model.switches import evaluating

COUNT_BYTES = 64 * 2**20  # of one tile of logits while ranks are counted


class Forced(NamedTuple):
    """One sequence to score: the ids before, and the ids that are scored (at least one of each)."""

    prompt: list[int]
    answer: list[int]


class TokenScores(NamedTuple):
    """Per answer token, `[L]` each, on the host."""

    logprobs: np.ndarray
    entropies: np.ndarray
    variances: np.ndarray
    hits: np.ndarray

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return float(-self.logprobs.mean())

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.logprobs).all())


class TokenRanks(NamedTuple):
    """Per answer token, `[L]` each: ids with a larger and with a smaller logit; `finite` is false after NaN logits."""

    above: np.ndarray
    below: np.ndarray
    finite: bool


def batches_by_length(lengths: Mapping[int, int], batch_size: int) -> list[list[int]]:
    """The keys, in batches of similar length, the longest first: a batch that does not fit in memory fails at once.

    Depends only on the lengths, so that an interrupted run has the same batches when it continues.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted an integer >= 1, got {batch_size}")
    order = sorted(lengths, key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def token_scores(model: nn.Module, batch: Sequence[Forced], pad_id: int) -> list[TokenScores]:
    """Scores of one batch of sequences. Two passes over the vocabulary; memory as in `linear_token_stats`."""
    with evaluating(model):
        hidden, head, labels = forced_hidden(model, batch, pad_id)
    stats = linear_token_stats(hidden, head, labels)
    hits = linear_topk(hidden, head, 1).indices[:, 0] == labels
    per_token: Any = (stats.label_logprob, stats.entropy, stats.logprob_variance)
    columns = [*(x.double().cpu().numpy() for x in per_token), hits.cpu().numpy()]
    ends = np.cumsum([len(item.answer) for item in batch])[:-1]
    return [TokenScores(*parts) for parts in zip(*(np.split(c, ends) for c in columns), strict=True)]


@torch.no_grad()
def next_token_logprobs(
    model: nn.Module, prompts: Sequence[list[int]], candidates: Sequence[Sequence[int]], pad_id: int
) -> list[np.ndarray]:
    """Log-probabilities of a few candidates for the token after each prompt: one forward pass for all of them."""
    first = [Forced(list(prompt), [ids[0]]) for prompt, ids in zip(prompts, candidates, strict=True)]
    with evaluating(model):
        hidden, head, _ = forced_hidden(model, first, pad_id)
    most = max(map(len, candidates))
    ids = torch.tensor([[*ids, *[ids[0]] * (most - len(ids))] for ids in candidates], device=hidden.device)
    logprobs = linear_gather(hidden, head, ids) - linear_logsumexp(hidden, head)[:, None]
    return [row[: len(ids)] for row, ids in zip(logprobs.double().cpu().numpy(), candidates, strict=True)]


@torch.no_grad()
def token_ranks(model: nn.Module, batch: Sequence[Forced], pad_id: int) -> list[TokenRanks]:
    """Ranks of the answer's tokens in the model's distribution, from both ends."""
    with evaluating(model):
        hidden, head, labels = forced_hidden(model, batch, pad_id)
    above, below, finite = (x.cpu().numpy() for x in count_ranks(hidden, head, labels))
    ends = np.cumsum([len(item.answer) for item in batch])[:-1]
    parts = zip(*(np.split(c, ends) for c in (above, below, finite)), strict=True)
    return [TokenRanks(a, b, bool(f.all())) for a, b, f in parts]


def count_ranks(hidden: Tensor, head: LMHead, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many ids have a larger, and how many a smaller logit than the label; and whether the row has no NaN.

        above_n = #{v : z_nv > z_n,label},   below_n = #{v : z_nv < z_n,label},   z = scale * (h W^T + b)

    The softcap is monotone and changes no order, so it is left out. Equal logits count on neither side.

    Args:
        hidden: `[N, D]`. head: `LMHead`. labels: `[N]` ids in [0, V).

    Returns:
        `[N]` int64, `[N]` int64, `[N]` bool.

    Memory: one `[N, tile]` fp32 tile of at most 64 MiB, rows in chunks where one id each would not fit. FLOP: 2 N D V.
    """
    head = head.narrowed()
    above, below = torch.zeros_like(labels), torch.zeros_like(labels)
    plain = LMHead(head.weight, head.bias, scale=head.scale)
    own = linear_gather(hidden, plain, labels[:, None]).float()
    finite = own[:, 0].isfinite()
    hidden = hidden.float()
    rows = max(1, min(len(labels), COUNT_BYTES // (4 * 256)))
    for n in range(0, len(labels), rows):
        part = slice(n, n + rows)
        tile = max(1, COUNT_BYTES // (4 * len(labels[part])))
        for start in range(0, head.num_ids, tile):
            stop = min(start + tile, head.num_ids)
            logits = hidden[part] @ head.weight[start:stop].float().T
            if head.bias is not None:
                logits += head.bias[start:stop].float()
            logits *= head.scale
            # A product and a gathered dot round differently: the label is never above or below itself.
            other = torch.arange(start, stop, device=labels.device) != labels[part, None]
            above[part] += ((logits > own[part]) & other).sum(1)
            below[part] += ((logits < own[part]) & other).sum(1)
            finite[part] &= ~logits.isnan().any(1)
    return above, below, finite


def forced_hidden(model: nn.Module, batch: Sequence[Forced], pad_id: int) -> tuple[Tensor, LMHead, Tensor]:
    """Hidden states `[N, D]` where the answers' tokens are predicted, the head, and those tokens `[N]`; differentiable."""
    inputs = Collator(pad_id)([plain_item(item.prompt, item.answer) for item in batch])
    device = next(model.parameters()).device
    ids, mask, positions, labels = (
        inputs[name].to(device) for name in ("input_ids", "attention_mask", "positions", "labels")
    )
    return *head_inputs(model, ids, mask, positions), labels
