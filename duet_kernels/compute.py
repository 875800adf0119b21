"""The operations and the losses on flattened, checked inputs: by the definition, or by the op of an implementation.

The public functions (`functional`) check, flatten, leave out masked tokens and choose; here nothing is refused but a
kind of differentiation that the ops do not have. Must not know leading shapes.

Legend: N tokens, D hidden size, K selected ids; `choice` is `reference`, `chunked` or `triton`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .dispatch import acc_dtype
from .divergence import Divergence
from .head import LMHead, TokenStats, TopK
from .tokens import Tokens

Linear = tuple[Tensor, Tensor, Tensor | None, float | None, float]


def _linear(hidden_nd: Tensor, head: LMHead) -> Linear:
    """What every op begins with: hidden states, weight, bias, softcap and scale.

    A custom op drops forward-mode tangents without a word, and zeros would pass for a derivative.
    """
    head = head.narrowed()
    if not torch.compiler.is_compiling():
        for name, leaf in (("hidden", hidden_nd), ("head.weight", head.weight), ("head.bias", head.bias)):
            if leaf is not None and forward_ad.unpack_dual(leaf).tangent is not None:
                raise RuntimeError(
                    f"{name}: carries a forward-mode tangent (torch.func.jvp), wanted a plain tensor; use impl='reference'"
                )
    return hidden_nd, head.weight, head.bias, head.softcap, head.scale


# --- operations ------------------------------------------------------------------------------------------------


def topk(hidden_nd: Tensor, head: LMHead, k: int, temperature: float, choice: str) -> TopK:
    if choice == "reference":
        return reference.linear_topk(hidden_nd, head, k, temperature)
    from . import autograd

    values, indices, tail = autograd.linear_topk(*_linear(hidden_nd, head), k, temperature, choice)
    return TopK(values, indices, tail, temperature)


def gather(hidden_nd: Tensor, head: LMHead, ids: Tensor, choice: str) -> Tensor:
    """`[N, K]`; an id below 0 is an absent slot, whose value nobody may read."""
    if choice == "reference":
        return reference.linear_gather(hidden_nd, head, ids.clamp(min=0))
    from . import autograd

    hidden_nd, weight, bias, softcap, scale = _linear(hidden_nd, head)
    return autograd.linear_gather(hidden_nd, weight, bias, ids, softcap, scale, choice)


def complement_and_values(
    hidden_nd: Tensor, head: LMHead, ids: Tensor, temperature: float, choice: str
) -> tuple[Tensor, Tensor]:
    """(`[N]` log-sum-exp of z / T over the ids not in `ids`, `[N, K]` z at them)."""
    if choice == "reference":
        return reference.complement_and_values(hidden_nd, head, ids, temperature)
    from . import autograd

    hidden_nd, weight, bias, softcap, scale = _linear(hidden_nd, head)
    with_gradient = torch.is_grad_enabled() and hidden_nd.requires_grad
    tail, values, _ = autograd.complement_and_values(
        hidden_nd, weight, bias, ids, softcap, scale, temperature, with_gradient, choice
    )
    return tail, values


def token_stats(hidden_nd: Tensor, head: LMHead, labels_n: Tensor | None, choice: str) -> TokenStats:
    if choice == "reference":
        return reference.token_stats(hidden_nd, head, labels_n)
    from . import autograd

    logsumexp, entropy, variance, logprob = autograd.token_stats(*_linear(hidden_nd, head), labels_n, choice)
    return TokenStats(logsumexp, entropy, variance, None if labels_n is None else logprob)


# --- losses ----------------------------------------------------------------------------------------------------


def topk_loss(
    hidden_nd: Tensor,
    head: LMHead,
    values_t: Tensor,
    ids: Tensor,
    tail_t: Tensor | None,
    spec: Divergence,
    tokens: Tokens,
    choice: str,
) -> Tensor:
    """The divergence from a teacher's logits at `[N, K]` ids (and from its tail `[N]`, if the loss reads it)."""
    acc = acc_dtype(hidden_nd.dtype)
    values_t = values_t.to(acc)
    tail_t = tail_t.to(acc) if tail_t is not None and spec.needs_teacher_logsumexp else None
    ids = ids.masked_fill(values_t == -torch.inf, -1)  # an absent slot: nothing gathered, nothing excluded
    tail_s = None
    if spec.needs_student_logsumexp:
        tail_s, values_s = complement_and_values(hidden_nd, head, ids, spec.temperature, choice)
    else:
        values_s = gather(hidden_nd, head, ids, choice)
    if choice == "reference":
        return tokens.reduce(tokens.weigh(reference.divergence(values_s, values_t, tail_s, tail_t, spec)))
    from . import autograd

    tails, factor = (tail_s, tail_t), tokens.factor.to(acc)
    rows, _, _ = autograd.topk_divergence(values_s, values_t, *tails, factor, *_options(spec), choice)
    return tokens.reduce(rows)


def dense_loss(
    hidden_nd: Tensor,
    student_head: LMHead,
    teacher_nd: Tensor,
    teacher_head: LMHead,
    spec: Divergence,
    tokens: Tokens,
    choice: str,
) -> Tensor:
    """The divergence over the whole vocabulary."""
    if choice == "reference":
        z_s, z_t = reference.logits(hidden_nd, student_head), reference.logits(teacher_nd, teacher_head)
        rows = reference.divergence(z_s, z_t.to(z_s.dtype), None, None, spec, absent_slots=False)
        return tokens.reduce(tokens.weigh(rows))
    from . import autograd

    student, teacher = _linear(hidden_nd, student_head), _linear(teacher_nd, teacher_head)
    reduce, need = _gradient_now(tokens, *student[:3])
    name, _, *options = _options(spec)
    factor = tokens.factor.to(acc_dtype(hidden_nd.dtype))
    loss = autograd.linear_divergence(*student, *teacher, factor, name, *options, reduce, *need, choice)[0]
    return loss if reduce else tokens.reduce(loss)


def cross_entropy(hidden_nd: Tensor, head: LMHead, labels_n: Tensor, tokens: Tokens, choice: str) -> Tensor:
    if choice == "reference":
        tail, values = complement_and_values(hidden_nd, head, labels_n[:, None], 1.0, choice)
        # log(1 + exp(tail - z_label)): a token that is almost certain keeps the digits of its small loss.
        return tokens.reduce(tokens.weigh(F.softplus(tail - values[:, 0], threshold=40.0)))
    from . import autograd

    linear = _linear(hidden_nd, head)
    reduce, need = _gradient_now(tokens, *linear[:3])
    factor = tokens.factor.to(acc_dtype(hidden_nd.dtype))
    loss = autograd.linear_cross_entropy(*linear, labels_n, factor, reduce, *need, choice)[0]
    return loss if reduce else tokens.reduce(loss)


def _options(spec: Divergence) -> tuple[str, str, float, float, float]:
    return spec.name, spec.normalization, spec.temperature, spec.beta, spec.delta


def _gradient_now(tokens: Tokens, *leaves: Tensor | None) -> tuple[bool, list[bool]]:
    """(whether the op sums the rows itself, which gradients of the sum it makes along with the loss)."""
    reduce = tokens.reduction != "none"
    grad = reduce and torch.is_grad_enabled()
    return reduce, [grad and x is not None and x.requires_grad for x in leaves]
