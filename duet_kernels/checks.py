"""Argument checks of the public functions: each error names the argument, what came and what was wanted.

Flattens leading shapes on the way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import DTYPES, acc_dtype
from .head import LMHead, TopK
from .options import FINITE, Divergence, check_ignore_index, check_number, check_tensor


def flatten_hidden(
    hidden: Tensor, head: LMHead, name: str = "hidden", head_name: str = "head"
) -> tuple[Tensor, tuple[int, ...]]:
    """(`[N, D]`, the leading shape). Under autocast hidden states are cast to the dtype of the head."""
    check_tensor(name, hidden, head.weight.device, f"{head_name}.weight")
    if hidden.dtype not in DTYPES:
        raise TypeError(f"{name}: wanted fp32, fp16, bf16 or fp64, got {hidden.dtype}")
    rows, width = head.weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != width:
        got = f"{list(hidden.shape)}"
        if hidden.dim() and hidden.shape[-1] in (rows, head.num_ids) and rows > width:
            got += "; these look like logits, wanted are the hidden states before the LM head (of a PEFT model: model.get_base_model().model(ids)[0])"
        raise ValueError(
            f"{name}: wanted shape [..., {width}] to match {head_name}.weight {[rows, width]}, got {got}"
        )
    if hidden.dtype != head.weight.dtype:
        if not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"{name}: wanted {head.weight.dtype} like {head_name}.weight, got {hidden.dtype} (cast one of them, or "
                "run under torch.autocast)"
            )
        hidden = hidden.to(head.weight.dtype)
    lead = tuple(hidden.shape[:-1])
    return hidden.reshape(math.prod(lead), hidden.shape[-1]), lead


def flatten_ids(
    name: str,
    ids: Tensor,
    lead: tuple[int, ...],
    num_ids: int,
    device: torch.device,
    *,
    ignore_index: int | None = None,
    per_token: bool = False,
) -> Tensor:
    """int64 `[N, K]` from `[..., K]`; `[N]` from `[...]` for labels. On a CPU ids outside the vocabulary are refused."""
    check_tensor(name, ids, device)
    if ignore_index is not None:
        check_ignore_index(ignore_index)
        per_token = True
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: wanted int64 or int32 ids, got {ids.dtype}")
    given = tuple(ids.shape) if per_token else tuple(ids.shape[:-1])
    if given != lead or (not per_token and ids.dim() == 0):
        wanted = list(lead) if per_token else [*lead, "K"]
        raise ValueError(f"{name}: wanted shape {wanted} to match the hidden states, got {list(ids.shape)}")
    flat = ids.reshape(math.prod(lead), *(() if per_token else ids.shape[-1:])).long()
    if device.type != "cpu" or torch.compiler.is_compiling():
        # Nobody looks: on a GPU that would be a synchronisation. Below 0 means an absent slot further on, so a negative id
        # becomes one that is too large, which is NaN.
        known = flat >= 0 if ignore_index is None else (flat >= 0) | (flat == ignore_index)
        return flat.where(known, num_ids + (num_ids == ignore_index))
    if flat.numel():
        low, high = torch.aminmax(flat if ignore_index is None else flat.where(flat != ignore_index, 0))
        if low < 0 or high >= num_ids:
            also = "" if ignore_index is None else f" or ignore_index={ignore_index}"
            raise ValueError(
                f"{name}: wanted ids in [0, {num_ids}){also}, got {int(low if low < 0 else high)}"
            )
    return flat


def check_topk(
    teacher: TopK, lead: tuple[int, ...], num_ids: int, spec: Divergence, hidden: Tensor, mass: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The flattened (values `[N, K]`, indices `[N, K]`, tail `[N]`) of a teacher that fits the student.

    Values and tail are in the dtype of the student's logits. The tail is None unless the loss reads it, or the teacher's
    `mass`, which can do without.
    """
    if not isinstance(teacher, TopK):
        kind = type(teacher).__name__
        plain = "; a slice of a TopK is a plain tuple of its fields" if kind == "tuple" else ""
        raise TypeError(f"teacher: wanted a TopK, got {kind}{plain}")
    if not isinstance(teacher.log_probabilities, bool):
        raise TypeError(
            f"teacher.log_probabilities: wanted True or False, got {type(teacher.log_probabilities).__name__}; a DataLoader's default "
            "collate makes a tensor of every field: collate values, indices and tail_logsumexp alone"
        )
    values = check_tensor("teacher.values", teacher.values, hidden.device)
    indices = check_tensor("teacher.indices", teacher.indices, hidden.device)
    if not values.is_floating_point():
        raise TypeError(f"teacher.values: wanted floating-point logits, got {values.dtype}")
    if values.dim() == 0 or tuple(values.shape[:-1]) != lead or values.shape[-1] < 1:
        raise ValueError(
            f"teacher.values: wanted shape {[*lead, 'K']} with K >= 1 to match the hidden states, got {list(values.shape)}"
        )
    if indices.shape != values.shape:
        raise ValueError(
            f"teacher.indices: wanted shape {list(values.shape)} like teacher.values, got {list(indices.shape)}"
        )
    tensors = {"values": values, "indices": indices}
    if spec.raw and teacher.log_probabilities:
        raise ValueError(
            f"teacher: holds log-probabilities, which are logits minus an unknown constant, and {spec.name!r} compares raw "
            "logits; wanted a TopK of logits, or a divergence of distributions such as 'forward_kl'"
        )
    tail, reads = teacher.tail_logsumexp, spec.needs_teacher_logsumexp
    if reads and tail is None:
        raise ValueError(f"teacher.tail_logsumexp: normalization={spec.normalization!r} reads it, got None")
    check_number("teacher.temperature", teacher.temperature, FINITE, "a number")
    if reads and teacher.temperature != spec.temperature:
        raise ValueError(
            f"teacher.temperature: normalization={spec.normalization!r} reads the teacher's tail, which was made at "
            f"temperature {teacher.temperature}; wanted {spec.temperature}"
        )
    if tail is not None and (reads or (mass and teacher.temperature == spec.temperature)):
        tail = tensors["tail_logsumexp"] = check_tensor("teacher.tail_logsumexp", tail, hidden.device)
        if tuple(tail.shape) != lead:
            raise ValueError(f"teacher.tail_logsumexp: wanted shape {list(lead)}, got {list(tail.shape)}")
        if not tail.is_floating_point():
            raise TypeError(f"teacher.tail_logsumexp: wanted a floating-point tail, got {tail.dtype}")
    else:
        tail = None
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(
                f"teacher.{name}: a teacher gets no gradient; wanted a detached tensor (make it under torch.no_grad())"
            )
    (n, k), acc = (math.prod(lead), values.shape[-1]), acc_dtype(hidden.dtype)
    indices = torch.where(values == -torch.inf, 0, indices)  # an absent slot may hold any id
    return (
        values.reshape(n, k).to(acc),
        flatten_ids("teacher.indices", indices, lead, num_ids, hidden.device),
        None if tail is None else tail.reshape(n).to(acc),
    )


def check_teacher_hidden(
    teacher_hidden: Tensor, teacher_head: LMHead, lead: tuple[int, ...], student_hidden: Tensor
) -> Tensor:
    """`[N, D_t]` hidden states of a teacher that fits the student."""
    flat, teacher_lead = flatten_hidden(teacher_hidden, teacher_head, "teacher_hidden", "teacher_head")
    if teacher_lead != lead:
        raise ValueError(
            f"teacher_hidden: wanted leading shape {list(lead)} like student_hidden, got {list(teacher_lead)}"
        )
    check_tensor("teacher_hidden", teacher_hidden, student_hidden.device, "student_hidden")
    if teacher_hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_hidden: requires grad, but a teacher gets no gradient; compute it under torch.no_grad() or pass "
            "teacher_hidden.detach()"
        )
    return flat
