"""OBJECTIVES: what the student minimises. A plain dict; add one with a function and one line:

    OBJECTIVES["mine"] = Objective(my_loss, targets=teacher_topk)

`my_loss(step)` returns a dict of 0-d tensors with "loss" in it; everything else in it is logged.

    record         Objective, Step, Counts: what a loss is given
    distillation   duet and its divergences, bidirectional, undo
    baselines      ga, graddiff, npo (and _kl: the retain term is a KL; _sam), simnpo, refusal, undial, shred, rmu, repselect
    deep           duet_deep
"""

from copy import copy
from dataclasses import fields
from functools import partial
from typing import Any

from torch import nn

from duet_kernels import LMHead

from ...model.lm import check_layer, select_parameters
from ...names import check_one_of, did_you_mean
from ..counterfactual import prepare_deep
from ..noising import UndoOptions, prepare_undo, start_undo
from ..selectivity import SelectivityOptions, check_selective_model, mlp_matrices, selective_direction
from ..sharpness import check_sharp_weights, trained
from .baselines import (
    answer_nll,
    answer_topk,
    gradient_ascent,
    gradient_difference,
    gradient_difference_kl,
    npo,
    npo_kl,
    refusal,
    rmu,
    rmu_parameters,
    shred,
    simnpo,
    teacher_activations,
    undial,
)
from .deep import DeepOptions, count_deep, duet_deep
from .distillation import (
    bidirectional,
    duet,
    duet_forward_kl,
    duet_jsd,
    duet_reverse_kl,
    duet_symmetric_kl,
    teacher_states,
    teacher_topk,
    undo,
)
from .record import Counts, Objective, Step

__all__ = [
    "OBJECTIVES",
    "Counts",
    "Objective",
    "Step",
    "answer_nll",
    "answer_topk",
    "check_options",
    "find_objective",
    "fit_model",
    "objective_of",
    "teacher_states",
    "teacher_topk",
]

_HUBER = ("k", "delta", "entropy_weighting")
_DIVERGENCE = ("k", "temperature", "normalization", "clip", "entropy_weighting")
_raw = partial(Objective, targets=teacher_topk, raw_logits=True)
# The base is asked about the answers as the student sees them; its few numbers can be kept.
_with_base = partial(Objective, teacher_sees="student", needs_answers=True, storable=True)

OBJECTIVES: dict[str, Objective] = {
    "duet": _raw(duet, reads=_HUBER),
    "duet_kl": Objective(duet_forward_kl, teacher_topk, reads=_DIVERGENCE),
    "duet_forward_kl": Objective(duet_forward_kl, teacher_topk, reads=_DIVERGENCE),
    "duet_reverse_kl": Objective(duet_reverse_kl, teacher_topk, reads=_DIVERGENCE),
    "duet_symmetric_kl": Objective(duet_symmetric_kl, teacher_topk, reads=("beta", *_DIVERGENCE)),
    "duet_jsd": Objective(duet_jsd, teacher_topk, reads=("beta", *_DIVERGENCE)),
    "duet_adversarial": _raw(duet, adversarial=True, reads=_HUBER),
    "bidirectional": _raw(bidirectional, reads=(*_HUBER, "push_weight")),
    "duet_deep": Objective(
        duet_deep,
        positions="prepared",
        prepare=prepare_deep,
        counts=count_deep,
        reads=("k", "retain_weight", *DeepOptions.__annotations__),
    ),
    "undo": Objective(
        undo,
        teacher_states,
        teacher_sees="student",
        positions="text",
        start=start_undo,
        prepare=prepare_undo,
        starts_at_teacher=False,
        reads=tuple(UndoOptions.__annotations__),
    ),
    "in_context": Objective(None, reads=(), keeps=False),
    "ga": Objective(gradient_ascent, needs_answers=True, reads=(), keeps=False),
    "graddiff": Objective(gradient_difference, needs_answers=True, reads=("retain_weight",)),
    "graddiff_kl": _with_base(gradient_difference_kl, answer_topk, reads=("k", "retain_weight")),
    "npo": _with_base(npo, answer_nll, reads=("npo_beta", "retain_weight")),
    "npo_kl": _with_base(npo_kl, answer_topk, reads=("k", "npo_beta", "retain_weight")),
    "npo_sam": _with_base(npo, answer_nll, sharp=True, reads=("npo_beta", "sam_rho", "retain_weight")),
    "simnpo": Objective(simnpo, needs_answers=True, reads=("simnpo_beta", "simnpo_gamma", "retain_weight")),
    "refusal": Objective(refusal, needs_answers=True, refuses=True, reads=("refusals", "retain_weight")),
    "undial": _with_base(undial, answer_topk, reads=("k", "undial_gamma", "retain_weight")),
    "shred": _with_base(shred, answer_topk, reads=("k", "shred_percent"), keeps=False),
    "repselect": Objective(
        gradient_ascent,
        needs_answers=True,
        trains=mlp_matrices,
        direction=selective_direction,
        reads=tuple(SelectivityOptions.__annotations__),
        keeps=False,
    ),
    "rmu": Objective(
        rmu,
        teacher_activations,
        teacher_sees="student",
        needs_answers=True,
        positions="text",
        layer=True,
        trains=rmu_parameters,
        reads=("rmu_layer", "rmu_scale", "rmu_alpha"),
    ),
}


def find_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: there is none; the nearest name is suggested.

    Example:
        >>> find_objective("npo").positions
        'answer'
    """
    check_one_of("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def objective_of(args: Any) -> Objective:
    """The objective that the options `args` name, when they fit it.

    Raises:
        ValueError: there is none of that name, or `check_options` refuses an option.
    """
    objective = find_objective(args.objective)
    check_options(objective, args)
    return objective


def check_options(objective: Objective, args: Any) -> None:
    """Refuses a `temperature`, `normalization` or `clip` that the objective would not read, and a `clip` of terms that may be < 0.

    `k` is not refused: one that is never looked up changes no number, and runs that compare methods share it.

    Raises:
        ValueError: naming the option, what came, what was wanted, and who reads it.
    """
    usual = {f.name: f.default for f in fields(args)}
    for name in objective.reads:
        if not hasattr(args, name):
            raise ValueError(
                f"objective {args.objective!r}: it reads {name!r} (Objective.reads), which is no option{did_you_mean(name, usual)}"
            )
    for name in ("temperature", "normalization", "clip"):
        given = getattr(args, name)
        if given != usual[name] and (objective.raw_logits or name not in objective.reads):
            why = "compares raw logits and does not read it" if objective.raw_logits else "does not read it"
            readers = ", ".join(key for key, each in OBJECTIVES.items() if name in each.reads)
            raise ValueError(
                f"{name}: objective {args.objective!r} {why}; wanted {usual[name]!r}, got {given!r} (it is read by {readers})"
            )
    for name in ("recovery_fraction", "later_target"):
        given = getattr(args, name)
        if given != usual[name] and not args.deep_refusals:
            raise ValueError(
                f"{name}: wanted {usual[name]!r} without deep_refusals, got {given!r}: the steered base does not refuse in the middle of an "
                "answer, so the texts must be given"
            )
    if args.clip is not None and args.normalization in ("zeroed", "truncated"):
        raise ValueError(
            f"clip: wanted None, got {args.clip!r}, because with normalization {args.normalization!r} what an id adds may be "
            "negative; renormalize, tail and generalized can be clipped"
        )


def fit_model(objective: Objective, model: nn.Module, head: LMHead, args: Any) -> Any:
    """What an objective wants of a model: its kind, a vocabulary of k ids, its layer, and which parameters are trained.

    Returns:
        the options for this model: `args`, or a copy with the layer.

    Raises:
        ValueError: naming what the model lacks.
    """
    if objective.loss is not None and not trained(model):
        raise ValueError(
            "model: wanted weights that can be trained, got none with requires_grad; model.requires_grad_(True) trains all, "
            "peft_config an adapter"
        )
    check_selective_model(objective, model)
    if objective.targets in (teacher_topk, answer_topk) and args.k > head.num_ids:
        raise ValueError(f"k: wanted at most the vocabulary's {head.num_ids}, got {args.k}")
    if objective.layer:
        args = copy(args)  # another model may be trained with them, too
        args.rmu_layer = check_layer(model, args.rmu_layer)
    trains = objective.trains
    if trains is not None:
        select_parameters(model, lambda name: trains(name, args), args.objective)
    check_sharp_weights(objective, model)
    return args
