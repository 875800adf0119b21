"""OBJECTIVES: what the student minimises. A plain dict; add one with a function and one line:

    OBJECTIVES["mine"] = Objective(my_loss, targets=teacher_topk)

`my_loss(step)` returns a dict of 0-d tensors with "loss" in it; everything else in it is logged.

    record         Objective, Step, Counts: what a loss is given
    distillation   duet and its divergences, bidirectional, undo
    baselines      ga, graddiff, npo (and _kl: the retain term is a KL), simnpo, refusal, undial, shred, rmu
    deep           duet_deep

Every loss here comes from public names of `duet_kernels`. Must not know models, tokenizers or the Trainer.
"""

from dataclasses import fields
from typing import TYPE_CHECKING

from ...names import check_one_of
from ..counterfactual import prepare_deep
from ..noising import prepare_undo, start_undo
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
from .deep import duet_deep
from .distillation import (
    bidirectional,
    duet,
    duet_forward_kl,
    duet_jsd,
    duet_reverse_kl,
    teacher_states,
    teacher_topk,
    undo,
)
from .record import Counts, Objective, Step

if TYPE_CHECKING:
    from ...config import DuetConfig

__all__ = [
    "OBJECTIVES",
    "Counts",
    "Objective",
    "Step",
    "answer_nll",
    "answer_topk",
    "check_options",
    "find_objective",
    "teacher_states",
    "teacher_topk",
]

_HUBER = ("k", "delta", "entropy_weighting")
_DIVERGENCE = ("k", "temperature", "normalization", "entropy_weighting")

OBJECTIVES: dict[str, Objective] = {
    "duet": Objective(duet, teacher_topk, reads=_HUBER),
    "duet_kl": Objective(duet_forward_kl, teacher_topk, reads=_DIVERGENCE),
    "duet_forward_kl": Objective(duet_forward_kl, teacher_topk, reads=_DIVERGENCE),
    "duet_reverse_kl": Objective(duet_reverse_kl, teacher_topk, reads=_DIVERGENCE),
    "duet_jsd": Objective(duet_jsd, teacher_topk, reads=("beta", *_DIVERGENCE)),
    "duet_adversarial": Objective(duet, teacher_topk, adversarial=True, reads=_HUBER),
    "bidirectional": Objective(bidirectional, teacher_topk, reads=(*_HUBER, "push_weight")),
    "duet_deep": Objective(
        duet_deep,
        positions="prepared",
        prepare=prepare_deep,
        reads=(
            "k",
            "retain_weight",
            "counterfactual_names",
            "num_counterfactuals",
            "refusal_fraction",
            "knowledge_threshold",
            "counterfactual_weight",
            "deep_npo_beta",
            "lift_weight",
        ),
    ),
    "undo": Objective(
        undo,
        teacher_states,
        teacher_sees="student",
        positions="text",
        start=start_undo,
        prepare=prepare_undo,
        starts_at_teacher=False,
        reads=("undo_alpha", "undo_beta", "undo_tolerance", "undo_check_steps"),
    ),
    "in_context": Objective(None, reads=()),
    "ga": Objective(gradient_ascent, needs_answers=True, reads=()),
    "graddiff": Objective(gradient_difference, needs_answers=True, reads=("retain_weight",)),
    "graddiff_kl": Objective(
        gradient_difference_kl,
        answer_topk,
        teacher_sees="student",
        needs_answers=True,
        storable=True,
        reads=("k", "retain_weight"),
    ),
    "npo": Objective(
        npo,
        answer_nll,
        teacher_sees="student",
        needs_answers=True,
        storable=True,
        reads=("npo_beta", "retain_weight"),
    ),
    "npo_kl": Objective(
        npo_kl,
        answer_topk,
        teacher_sees="student",
        needs_answers=True,
        storable=True,
        reads=("k", "npo_beta", "retain_weight"),
    ),
    "simnpo": Objective(simnpo, needs_answers=True, reads=("simnpo_beta", "simnpo_gamma", "retain_weight")),
    "refusal": Objective(refusal, needs_answers=True, refuses=True, reads=("refusals", "retain_weight")),
    "undial": Objective(
        undial,
        answer_topk,
        teacher_sees="student",
        needs_answers=True,
        storable=True,
        reads=("k", "undial_gamma", "retain_weight"),
    ),
    "shred": Objective(
        shred,
        answer_topk,
        teacher_sees="student",
        needs_answers=True,
        storable=True,
        reads=("k", "shred_percent"),
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


def check_options(objective: Objective, args: "DuetConfig") -> None:
    """Refuses a `temperature` or `normalization` that the objective would not read.

    `k` is not refused: one that is never looked up changes no number, and runs that compare methods share it.

    Raises:
        ValueError: naming the option, what came, what was wanted, and who reads it.
    """
    usual = {f.name: f.default for f in fields(args)}
    for name in ("temperature", "normalization"):
        given = getattr(args, name)
        if name not in objective.reads and given != usual[name]:
            readers = ", ".join(key for key, each in OBJECTIVES.items() if name in each.reads)
            raise ValueError(
                f"{name}: objective {args.objective!r} does not read it; wanted {usual[name]!r}, got {given!r} (it is "
                f"read by {readers})"
            )
