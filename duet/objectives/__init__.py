"""OBJECTIVES: what the student minimises. A plain dict; add one with a function and one line:

    OBJECTIVES["mine"] = Objective(my_loss, targets=teacher_topk)

`my_loss(step)` returns a dict of 0-d tensors with "loss" in it; everything else in it is logged.

    record         Objective, Step, Counts: what a loss is given
    distillation   duet and its divergences, bidirectional, undo
    baselines      ga, graddiff, npo (and _kl: the retain term is a KL), simnpo, refusal, undial, shred, rmu
    deep           duet_deep

Every loss here comes from public names of `duet_kernels`. Must not know models, tokenizers or the Trainer.
"""

from difflib import get_close_matches

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

__all__ = [
    "OBJECTIVES",
    "Counts",
    "Objective",
    "Step",
    "answer_nll",
    "answer_topk",
    "find_objective",
    "teacher_states",
    "teacher_topk",
]

OBJECTIVES: dict[str, Objective] = {
    "duet": Objective(duet, teacher_topk),
    "duet_kl": Objective(duet_forward_kl, teacher_topk),
    "duet_forward_kl": Objective(duet_forward_kl, teacher_topk),
    "duet_reverse_kl": Objective(duet_reverse_kl, teacher_topk),
    "duet_jsd": Objective(duet_jsd, teacher_topk),
    "duet_adversarial": Objective(duet, teacher_topk, adversarial=True),
    "bidirectional": Objective(bidirectional, teacher_topk),
    "duet_deep": Objective(duet_deep, positions="prepared", prepare=prepare_deep),
    "undo": Objective(
        undo,
        teacher_states,
        teacher_sees="student",
        positions="text",
        start=start_undo,
        prepare=prepare_undo,
        starts_at_teacher=False,
    ),
    "in_context": Objective(None),
    "ga": Objective(gradient_ascent, needs_answers=True),
    "graddiff": Objective(gradient_difference, needs_answers=True),
    "graddiff_kl": Objective(gradient_difference_kl, answer_topk, teacher_sees="student", needs_answers=True),
    "npo": Objective(npo, answer_nll, teacher_sees="student", needs_answers=True),
    "npo_kl": Objective(npo_kl, answer_topk, teacher_sees="student", needs_answers=True),
    "simnpo": Objective(simnpo, needs_answers=True),
    "refusal": Objective(refusal, needs_answers=True, refuses=True),
    "undial": Objective(undial, answer_topk, teacher_sees="student", needs_answers=True),
    "shred": Objective(shred, answer_topk, teacher_sees="student", needs_answers=True),
    "rmu": Objective(
        rmu,
        teacher_activations,
        teacher_sees="student",
        needs_answers=True,
        positions="text",
        layer=True,
        trains=rmu_parameters,
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
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    close = get_close_matches(str(name), OBJECTIVES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"objective: wanted one of {', '.join(OBJECTIVES)}, got {name!r}{hint}")
