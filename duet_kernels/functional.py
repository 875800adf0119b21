"""The public functions: check, flatten, leave out masked tokens, choose an implementation, give the shape back.

What they promise stands in their docstrings; what they refuse in `checks`, how it is computed in `ops`.

Legend: `[...]` any leading shape (N tokens when flattened), D hidden size, V vocabulary, K selected ids,
T temperature. All losses are in nats per token (the raw-logit ones in logits, squared where they are squares).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, sharded
from .checks import check_teacher_hidden, check_topk, flatten_hidden, flatten_ids
from .dispatch import Impl, resolve_impl
from .head import DistillStats, LMHead, TokenStats, TopK, as_head
from .options import (
    TEMPERATURES,
    Divergence,
    DivergenceName,
    Normalization,
    Reduction,
    Support,
    check_ignore_index,
    check_number,
    lists_divergences,
    loss_tokens,
)


def linear_topk(
    hidden: Tensor, head: LMHead | Tensor, k: int, *, temperature: float = 1.0, impl: Impl = "auto"
) -> TopK:
    """The k largest logits of each token, their ids, and the log-sum-exp of all the others.

    `z = softcap(scale * (h W^T + b))`; values, ids = top-k of z; tail = log sum over j not in ids of exp(z_j / T).

    Exact. Equal logits go to the lowest id among the logits that the implementation computed. A selection has no
    gradient: inputs are detached (`linear_gather` at the ids is differentiable).

    Args:
        hidden: `[..., D]` fp32, fp16, bf16 or fp64.
        head: `LMHead`, or its weight `[V, D]` in the dtype of `hidden`.
        k: 1 to V.
        temperature: T of the tail, 0.001 to 1000.
        impl: `auto`, `chunked`, `triton`, `reference`; see `resolve_impl`.

    Returns:
        TopK: values `[..., K]` descending, indices `[..., K]` int64, tail `[...]`; fp32 (fp64 for fp64). A token with
        a NaN logit has NaN values.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Memory: within the workspace; `chunked` holds `[N, V]` only where it is below 2 MiB, or for 256 tokens or fewer on a
    GPU. FLOP: 2 N D V. Besides, the Triton kernels compare every two of a token's K or more candidates: at least N K^2
    comparisons.
    Source: DUET (arXiv 2601.21283), the candidate set C_K.

    Example:
        >>> head = LMHead(torch.eye(4))
        >>> top = linear_topk(torch.tensor([[0.0, 3.0, 1.0, 3.0]]), head, k=2)
        >>> top.indices.tolist(), top.values.tolist()
        ([[1, 3]], [[3.0, 3.0]])
    """
    head = as_head(head).detach()
    hidden_nd, lead = flatten_hidden(hidden, head)
    hidden_nd = hidden_nd.detach()
    k = check_number("k", k, (1, head.num_ids), "an integer from {} to {} (the vocabulary)", int)
    temperature = check_number("temperature", temperature, TEMPERATURES)
    run, choice = _resolve("linear_topk", hidden_nd, head, impl, k)
    values, indices, tail = run.linear_topk(hidden_nd, head, k, temperature, choice)
    return TopK(values.view(*lead, k), indices.view(*lead, k), tail.view(lead), temperature)


def linear_gather(hidden: Tensor, head: LMHead | Tensor, indices: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Logits at the given ids, without a pass over the vocabulary.

    `z[..., k] = softcap(scale * (h . W[ids[..., k]] + b[ids[..., k]]))`. Differentiable in `hidden`, weight and bias;
    dW is deterministic and writes only what was asked for (ids may repeat, their gradients add up).

    Args:
        hidden: `[..., D]` fp32, fp16, bf16 or fp64.
        head: `LMHead`, or its weight `[V, D]` in the dtype of `hidden`.
        indices: `[..., K]` int64 or int32 in [0, V), same leading shape as `hidden`.
        impl: `auto`, `chunked`, `triton`, `reference`.

    Returns:
        `[..., K]` fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: naming the argument; ids out of range on a CPU. On a GPU such an id gives NaN: to look
            would be a synchronisation.

    Memory: gathered rows of a few tokens at a time, never `[N, K, D]` (a few MiB on a CPU, but the K D of one token are not
    cut; twice that for halves); with a trainable head also
    some 40 bytes for each of the N K pairs that are sorted, whatever the workspace is (256 MiB at 6.7 million pairs: pass
    fewer tokens at a time).
    FLOP: 2 N K D forward, 2 N K D each for dh and dW. For many ids (a CPU: K > V / 16, half precision V / 10) the
    forward pass multiplies all logits of a few tokens at a time, within the workspace: 2 N D V.
    Source: DUET (arXiv 2601.21283), g_theta^i(x) of equation 3.

    Example:
        >>> linear_gather(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1]])).tolist()
        [[7.0]]
    """
    head = as_head(head)
    hidden_nd, lead = flatten_hidden(hidden, head)
    ids = flatten_ids("indices", indices, lead, head.num_ids, hidden.device)
    run, choice = _resolve("linear_gather", hidden_nd, head, impl, ids.shape[1])
    return run.linear_gather(hidden_nd, head, ids, choice).view(*lead, ids.shape[1])


def linear_logsumexp(
    hidden: Tensor,
    head: LMHead | Tensor,
    *,
    temperature: float = 1.0,
    exclude: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The log-sum-exp of all logits, or of all but the given ids (summed directly, never as 1 - sum p).

    `log sum over j not in exclude of exp(z_j / T)`, -inf when nothing is left. Differentiable in `hidden`, weight and
    bias.

    Args:
        hidden: `[..., D]` fp32, fp16, bf16 or fp64.
        head: `LMHead`, or its weight `[V, D]` in the dtype of `hidden`.
        temperature: T, 0.001 to 1000.
        exclude: `[..., K]` int64 or int32 ids in [0, V), or None. Repeated ids count once.
        impl: `auto`, `chunked`, `triton`, `reference`.

    Returns:
        `[...]` fp32 (fp64 for fp64 inputs), in nats.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Memory: tiles within the workspace and `[N, D]` for the gradient, never `[N, V]`. dW of halves on a CPU casts the hidden
    states of 8192 tokens at a time to fp32.
    FLOP: 2 N D V forward; 2 N D V for dh; 4 N D V for dW (tiles are recomputed; a frozen head skips it).
    Source: the softmax denominator; its complement is the tail bucket of a top-k divergence (MATH.md).

    Example:
        >>> linear_logsumexp(torch.zeros(1, 2), torch.zeros(4, 2), exclude=torch.tensor([[0, 1]])).exp().tolist()
        [2.0]
    """
    head = as_head(head)
    hidden_nd, lead = flatten_hidden(hidden, head)
    temperature = check_number("temperature", temperature, TEMPERATURES)
    if exclude is None:
        ids = torch.empty(hidden_nd.shape[0], 0, dtype=torch.int64, device=hidden.device)
    else:
        ids = flatten_ids("exclude", exclude, lead, head.num_ids, hidden.device)
    run, choice = _resolve("linear_logsumexp", hidden_nd, head, impl, ids.shape[1])
    return run.linear_logsumexp(hidden_nd, head, ids, temperature, choice).view(lead)


@lists_divergences
def topk_distill_loss(
    hidden: Tensor,
    head: LMHead | Tensor,
    teacher: TopK,
    *,
    divergence: DivergenceName = "huber",
    normalization: Normalization | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    delta: float = 1.0,
    clip: float | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Distance of the student's logits to the teacher's at the teacher's top-k ids, from the student's hidden states.

    With d = z_student - z_teacher, or with p (teacher) and q (student) at softmax(z / T), **summed over the k ids**:

    {divergences}

    No loss is multiplied by T^2.

    Args:
        hidden: `[..., D]` student's hidden states.
        head: student's `LMHead`, or its weight `[V, D]`.
        teacher: `TopK` with the leading shape of `hidden`; never gets a gradient. Slots of -inf are absent. From
            log-probabilities: `TopK.from_logprobs` (for divergences of distributions).
        divergence: see above.
        normalization: for distributions only. `renormalize` (default): both over the k ids. `tail`: one more bucket
            for all other ids. `zeroed`: teacher over the k ids, student's full softmax (`forward_kl` only).
            `truncated`: the sum over the k ids of full softmaxes; may be negative (`forward_kl`, `reverse_kl`).
            `generalized`: the same with q - p added to each term of KL(p||q), p - q to each of KL(q||p); no term is
            negative (`forward_kl`, `reverse_kl`).
        temperature: T, 0.001 to 1000; must be 1 for raw logits, and `teacher.temperature` where the teacher's tail is
            used.
        beta: weight of the first KL where an equation has two, 0.001 to 0.999.
        delta: threshold of `huber`, in logits, 1e-10 to 1e10.
        clip: most nats that one id adds, 1e-6 to 1e6; None: no limit. An id above it adds `clip` and no gradient of its
            own. For distributions with `renormalize`, `tail` or `generalized`: it limits terms that are >= 0, a KL's
            with q - p or p - q added. The limit of p log(p/q) itself can turn a loss around (MATH.md); not offered.
        mask: `[...]` bool, True where the token that this position predicts counts: `labels[:, 1:] != -100` for
            `hidden[:, :-1]`, where `labels[t]` is token t.
        weights: `[...]` factors on token losses, constants.
        reduction: `mean` = sum of weighted token losses / number of unmasked tokens (or / `num_items`), `sum`, or
            `none` (the leading shape, 0 where masked).
        num_items: a number >= 0 or a 0-d tensor, the denominator of `mean` over a whole accumulated step. Where ranks call
            this with tokens of their own and average gradients (DDP, FSDP): the count of all ranks divided by their number.
        impl: `auto`, `chunked`, `triton`, `reference`.

    Returns:
        0-d, or `[...]` for `reduction="none"`; fp32 (fp64 for fp64). All masked: 0 with zero gradients. A NaN logit
        makes its own token's loss NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Memory and FLOP: raw logits and `renormalize` touch K rows of W a token: 2 N K D for the loss, 2 N K D for dh, and
    for a trainable head 2 N K D for dW; no vocabulary-sized product (with more than V / 16 ids a CPU may make all logits, which
    is cheaper). The others add those of `linear_logsumexp`. Where a
    mask leaves tokens out, an eager CPU copies the hidden states of those that count.
    Source: DUET (arXiv 2601.21283) equation 3 for `huber`, MOPD (arXiv 2606.30406) equation 5 for `generalized`;
    MATH.md for all.

    Example:
        >>> hidden, weight = torch.zeros(1, 2, requires_grad=True), torch.eye(2)
        >>> teacher = TopK(torch.tensor([[0.5]]), torch.tensor([[0]]), torch.tensor([0.0]))
        >>> topk_distill_loss(hidden, weight, teacher).item()
        0.125
    """
    spec = Divergence.of(divergence, normalization, temperature, beta, delta, clip)
    head = as_head(head)
    hidden_nd, lead = flatten_hidden(hidden, head)
    values, indices, tail = check_topk(teacher, lead, head.num_ids, spec, hidden_nd)
    k, lse = values.shape[1], spec.needs_student_logsumexp
    run, choice = _resolve("topk_distill_loss", hidden_nd, head, impl, k, lse)
    tokens = loss_tokens(hidden_nd, lead, mask, weights, reduction, num_items, choice)
    values, indices = tokens.take(values, fill=-torch.inf), tokens.take(indices, head.num_ids)
    tail = None if tail is None else tokens.take(tail)
    hidden_nd = tokens.take(hidden_nd, passed_over=(run, choice) == (ops, "triton"))
    return run.topk_loss(hidden_nd, head, values, indices, tail, spec, tokens, choice)


def topk_distill_stats(
    hidden: Tensor,
    head: LMHead | Tensor,
    teacher: TopK,
    *,
    divergence: DivergenceName = "huber",
    normalization: Normalization | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    delta: float = 1.0,
    clip: float | None = None,
    mask: Tensor | None = None,
    token_ids: Tensor | None = None,
    student_mass: bool = False,
    entropy: bool = False,
    overlap: bool = False,
    impl: Impl = "auto",
) -> DistillStats:
    """The loss of each token as `topk_distill_loss` defines it, and beside it what is logged or weighed in on-policy training.

    With p (teacher) and q (student) at softmax(z / T) over the vocabulary and S the teacher's k ids:

    * `loss` = the divergence, `logprob` = log q(token), both differentiable, with one backward pass for the two
    * `entropy` = -sum q log q, `student_mass` = sum of q over S, `teacher_mass` = sum of p over S
    * `overlap` = |S and the student's own |S| largest| / |S|

    Args:
        hidden: `[..., D]` student's hidden states.
        head: student's `LMHead`, or its weight `[V, D]`.
        teacher: likewise as in `topk_distill_loss`.
        divergence: likewise; so are `normalization`, `temperature`, `beta`, `delta`, `clip`.
        mask: `[...]` bool; every result is 0 where it is False.
        token_ids: `[...]` int64 or int32, the sampled tokens, for `logprob` (or labels, whose cross-entropy is
            `-logprob`); anything where masked.
        student_mass: whether it is wanted where nothing else needs the log-sum-exp that it needs.
        entropy: whether it is wanted.
        overlap: likewise.
        impl: `auto`, `chunked`, `triton`, `reference`.

    Returns:
        DistillStats of `[...]` tensors, fp32 (fp64 for fp64), in nats; None for what was not asked for. There is no
        reduction: `(stats.loss * weights).sum() / num_items`. All masked: 0 with zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Memory: within the workspace, never `[N, V]`. FLOP, with G = 2 N D V, is that of `topk_distill_loss(...,
    reduction="none")`, and
        `teacher_mass`: nothing. It is None where the teacher's tail is not known at T.
        `logprob`, `student_mass`, `entropy`: the sums of one pass over the vocabulary. Nothing where the normalization needs
            that pass anyway (all but raw logits and `renormalize`); else 1 G, and for `logprob` 1 G for dh, 2 G for dW.
        `overlap`: a pass of its own that selects, 1 G.
    Source: verl logs masses and overlap as defined in arXiv 2604.13016; the log-probability is the policy gradient's.

    Example:
        >>> hidden, weight = torch.zeros(1, 2, requires_grad=True), torch.eye(2)
        >>> teacher = TopK.from_logprobs(torch.tensor([[0]]), torch.tensor([[-0.5]]))
        >>> options = {"divergence": "reverse_kl", "normalization": "tail", "token_ids": torch.tensor([1])}
        >>> stats = topk_distill_stats(hidden, weight, teacher, **options)
        >>> round(stats.logprob.exp().item(), 6), stats.student_mass.item(), stats.entropy
        (0.5, 0.5, None)
    """
    spec = Divergence.of(divergence, normalization, temperature, beta, delta, clip)
    head = as_head(head)
    hidden_nd, lead = flatten_hidden(hidden, head)
    values, indices, tail = check_topk(teacher, lead, head.num_ids, spec, hidden_nd, mass=True)
    sampled = None
    if token_ids is not None:
        if isinstance(mask, Tensor) and isinstance(token_ids, Tensor) and mask.shape == token_ids.shape:
            token_ids = torch.where(mask.bool(), token_ids, 0)  # what is masked may be anything, -100 say
        sampled = flatten_ids("token_ids", token_ids, lead, head.num_ids, hidden.device, per_token=True)
    differentiable = spec.needs_student_logsumexp or sampled is not None  # in the log-sum-exp
    lse = differentiable or student_mass or entropy
    run, choice = _resolve("topk_distill_loss", hidden_nd, head, impl, values.shape[1], lse)
    tokens = loss_tokens(hidden_nd, lead, mask, None, "none", None, choice)

    def results(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else tokens.reduce(tokens.weigh(rows.to(tokens.factor.dtype)))

    hidden_nd, indices = tokens.take(hidden_nd), tokens.take(indices, head.num_ids)
    values = tokens.take(values, fill=-torch.inf)  # no slots: nothing infinite is multiplied by 0
    tail, told = None if tail is None else tokens.take(tail), None
    if tail is not None:  # at the temperature of the loss
        told = ops.teacher_mass(values, indices, tail, spec.temperature)
    sampled = None if sampled is None else tokens.take(sampled, head.num_ids)
    still, still_head, shared = hidden_nd.detach(), head.detach(), None
    if overlap:
        _, choice_k = _resolve("linear_topk", hidden_nd, head, impl, values.shape[1])
        shared = run.overlap(still, still_head, values, indices, choice_k)
    of_teacher = values, indices, tail if spec.needs_teacher_logsumexp else None
    options = sampled, entropy, spec, choice
    if differentiable:
        loss, *others = run.topk_stats(hidden_nd, head, *of_teacher, *options)
        loss = tokens.reduce(tokens.weigh(loss))
    else:
        loss = run.topk_loss(hidden_nd, head, *of_teacher, spec, tokens, choice)
        others = [None, None, None]
        if student_mass or entropy:
            others = run.topk_stats(still, still_head, *of_teacher, *options)[1:]
    logprob, mass, spread = map(results, others)
    return DistillStats(loss, logprob, spread, mass, results(told), results(shared))


def linear_distill_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    *,
    k: int | None = None,
    support: Support = "teacher",
    divergence: DivergenceName = "forward_kl",
    normalization: Normalization | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    delta: float = 1.0,
    clip: float | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Distance between two models' logits from both hidden states: over the whole vocabulary, or over k ids.

    `k=None`: the divergences of `topk_distill_loss` summed over all ids. With k: the ids are the k largest logits of
    the `teacher`, of the `student`, or their `union` (`support`), and the loss is that of `topk_distill_loss` there.
    Student and teacher may differ in hidden size, and in vocabulary size: then the common ids count. An id with a teacher
    bias of -inf counts with `k=None`, unless the student's is -inf, too. With k it is an absent slot; what the student
    gives it belongs to its tail (`normalization="tail"`). For the other arguments see `topk_distill_loss`.

    Args:
        student_hidden: `[..., D_s]`.
        student_head: `LMHead` or weight `[V_s, D_s]`.
        teacher_hidden: `[..., D_t]`, detached (`.detach()`, or computed under `torch.no_grad()`).
        teacher_head: `LMHead` or weight `[V_t, D_t]`; never gets a gradient.
        k: number of ids, or None for all. `normalization` needs k.
        support: who chooses the ids; only with k.

    Returns:
        0-d, or `[...]` for `reduction="none"`; fp32 (fp64 for fp64). All masked: 0 with zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted; teacher hidden states that require
            grad are refused.

    Memory: within the workspace, never `[N, V]`; `chunked` adds dW accumulated in fp32, which the kernels sum in the workspace.
    FLOP, with G = 2 N D V: dense 4 G (3 G with a frozen head, of which a KL cut into tiles 4 G; `reduction="none"`, and where dW in fp32
    does not fit into the workspace: 6 G); top-k 1 G for the teacher, then those of `topk_distill_loss`.
    Source: Hinton et al. 2015 (arXiv 1503.02531); generalised JSD: Agarwal et al. 2023 (arXiv 2306.13649).

    Example:
        >>> hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
        >>> linear_distill_loss(hidden, weight, hidden, weight).abs().item() < 1e-5
        True
    """
    spec = Divergence.of(divergence, normalization, temperature, beta, delta, clip, support, k is None)
    student_head = as_head(student_head, "student_head")
    teacher_head = as_head(teacher_head, "teacher_head").detach()
    hidden_nd, lead = flatten_hidden(student_hidden, student_head, "student_hidden", "student_head")
    teacher_nd = check_teacher_hidden(teacher_hidden, teacher_head, lead, student_hidden)
    common = min(student_head.num_ids, teacher_head.num_ids)
    student_head, teacher_head = student_head.narrowed(common), teacher_head.narrowed(common)
    if k is not None:
        k = check_number("k", k, (1, common), "None or an integer from {} to {} (the common vocabulary)", int)
    op = "linear_distill_loss" if k is None else "linear_topk"
    run, choice = _resolve(op, hidden_nd, student_head, impl, k)
    # Masked tokens are left out before the teacher's pass over the vocabulary, the dearest step of all.
    tokens = loss_tokens(hidden_nd, lead, mask, weights, reduction, num_items, choice)
    if k is None:
        run = run if teacher_head.group is None else sharded
        passed_over = (run, choice) == (ops, "triton")
        hidden_nd, teacher_nd = (tokens.take(x, passed_over=passed_over) for x in (hidden_nd, teacher_nd))
        return run.dense_loss(hidden_nd, student_head, teacher_nd, teacher_head, spec, tokens, choice)
    hidden_nd, teacher_nd = tokens.take(hidden_nd), tokens.take(teacher_nd)
    options: dict[str, Any] = {"temperature": spec.temperature, "impl": impl}
    if support == "teacher":
        values, ids, tail, *_ = linear_topk(teacher_nd, teacher_head, k, **options)
    else:
        ids, tail = linear_topk(hidden_nd, student_head, k, **options).indices, None
        if support == "union":
            ids = torch.cat([linear_topk(teacher_nd, teacher_head, k, **options).indices, ids], -1)
        with torch.no_grad():
            values = linear_gather(teacher_nd, teacher_head, ids, impl=impl)
            if spec.needs_teacher_logsumexp:
                tail = linear_logsumexp(teacher_nd, teacher_head, exclude=ids, **options)
        values = values.masked_fill(ops.met_before(ids), -torch.inf)  # an id that both chose is compared once
    values = values.to(student_head.acc)
    tail = tail.to(student_head.acc) if tail is not None and spec.needs_teacher_logsumexp else None
    k, lse = ids.shape[1], spec.needs_student_logsumexp
    run, choice = _resolve("topk_distill_loss", hidden_nd, student_head, impl, k, lse)
    return run.topk_loss(hidden_nd, student_head, values, ids, tail, spec, tokens, choice)


def linear_cross_entropy(
    hidden: Tensor,
    head: LMHead | Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy (negative log-likelihood) of the labels, from hidden states: logsumexp(z) - z_label.

    Args:
        hidden: `[..., D]`.
        head: `LMHead` or weight `[V, D]`.
        labels: `[...]` int64 or int32, in [0, V) or `ignore_index` (not counted). Not shifted: labels[i] belongs to
            hidden[i].
        weights: as in `topk_distill_loss`.
        reduction: likewise; `mean` divides by the number of labels that are not `ignore_index`, or by `num_items`.
        num_items: likewise.
        impl: `auto`, `chunked`, `triton`, `reference`.

    Returns:
        0-d, or `[...]` for `reduction="none"` (0 where ignored), nats per token. All ignored: 0 with zero gradients.

    Raises:
        TypeError, ValueError: naming the argument; labels out of range on a CPU (on a GPU: NaN).

    Memory: within the workspace, never `[N, V]`; labels that are ignored are left out as by a mask, and dW of halves is made
    as in `linear_logsumexp`.
    FLOP, with G = 2 N D V: 1 G for the loss, 1 G for dh, 1 G for dW, all in the forward pass, where the factor of every
    row is known. dW takes 2 G where its sum in fp32 does not fit into the workspace (`triton`), or where `chunked` tiles the vocabulary (a
    half head, few tokens, or a workspace that holds few rows of logits). `reduction="none"` computes the logits again in the backward pass: 1 G more.
    Source: maximum likelihood; `-linear_cross_entropy(..., reduction="none")` are token log-probabilities.

    Example:
        >>> linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, -100])).exp().item()
        4.0
    """
    head = as_head(head)
    hidden_nd, lead = flatten_hidden(hidden, head)
    check_ignore_index(ignore_index)
    ids = flatten_ids("labels", labels, lead, head.num_ids, hidden.device, ignore_index=ignore_index)
    run, choice = _resolve("linear_cross_entropy", hidden_nd, head, impl)
    mask = ids.view(lead) != ignore_index
    tokens = loss_tokens(hidden_nd, lead, mask, weights, reduction, num_items, choice)
    ids = tokens.take(ids.where(ids != ignore_index, 0), head.num_ids)
    hidden_nd = tokens.take(hidden_nd, passed_over=(run, choice) == (ops, "triton"))
    return run.cross_entropy(hidden_nd, head, ids, tokens, choice)


def linear_token_stats(
    hidden: Tensor,
    head: LMHead | Tensor,
    labels: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    impl: Impl = "auto",
) -> TokenStats:
    """Log-sum-exp, entropy and variance of the log-probability of each token's distribution; log p of its label.

    `H = -sum p log p`, `Var = sum p (log p + H)^2`. One pass over the vocabulary; no gradient (inputs are detached).
    An almost certain token keeps the digits of its entropy and of its label's log p: sums run without their largest
    term, and log p(y) = (z_y - max z) - log1p(the rest), from the logit of that same pass.

    Args:
        hidden: `[..., D]`.
        head: `LMHead` or weight `[V, D]`.
        labels: `[...]` ids in [0, V), or `ignore_index`, or None.
        ignore_index: the label of tokens without one (-100, say), whose log-probability is 0 as their cross-entropy
            would be: leave them out of a mean. None: every label is an id.
        impl: `auto`, `chunked`, `triton`, `reference`.

    Returns:
        TokenStats of `[...]` tensors, fp32 (fp64 for fp64), in nats (variance: nats^2).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Memory: tiles within the workspace. FLOP: 2 N D V.
    Source: Min-K%++ (arXiv 2404.02936) standardises log p by this mean and variance; TSD-KD (arXiv 2603.13260)
    weighs tokens by entropy.

    Example:
        >>> linear_token_stats(torch.zeros(1, 2), torch.zeros(8, 2)).entropy.exp().round().tolist()
        [8.0]
    """
    head = as_head(head).detach()
    hidden_nd, lead = flatten_hidden(hidden, head)
    hidden_nd = hidden_nd.detach()
    ids = ignored = None
    if labels is not None:
        size, options = head.num_ids, {"ignore_index": ignore_index, "per_token": True}
        ids = flatten_ids("labels", labels, lead, size, hidden.device, **options)
        if ignore_index is not None:
            ignored = ids == ignore_index
            ids = ids.masked_fill(ignored, 0)
    run, choice = _resolve("linear_token_stats", hidden_nd, head, impl)
    stats = run.token_stats(hidden_nd, head, ids, choice)
    logsumexp, entropy, variance = (x.view(lead) for x in stats[:3])
    label = None if ids is None else stats[3].view(lead)
    if label is not None and ignored is not None:
        label = label.masked_fill(ignored.view(lead), 0)
    return TokenStats(logsumexp, entropy, variance, label)


# --- shared steps ----------------------------------------------------------------------------------------------


def _resolve(
    op: str, hidden_nd: Tensor, head: LMHead, impl: Impl, k: int | None = None, lse: bool = False
):  # no type is written for the result: a type checker then checks the calls into `ops` and `sharded`
    """(`ops` or `sharded`, the implementation of `op`); `lse`: of its form that needs a log-sum-exp of the student."""
    op, (n, _) = f"{op}/lse" if lse else op, hidden_nd.shape
    choice, _ = resolve_impl(op, hidden_nd.device, hidden_nd.dtype, impl, tokens=n, k=k)
    return ops if head.group is None else sharded, choice
