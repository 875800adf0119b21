"""Which checks of the contract an operation is put to in which of several settings (a dtype, a head)."""

from duet_kernels.testing import CHECKS, OPS, check_definition, check_reductions, check_upstream

# One of each way through the code: every check in every second setting.
WAYS = (
    "gather",
    "logsumexp",
    "logsumexp-exclude",
    "cross-entropy",
    "topk-huber",
    "topk-forward_kl-renormalize",
    "topk-forward_kl-tail",
    "linear-huber",
    "linear-jsd",
    "stats-reverse_kl-generalized",
)
_NAMES = [op.name for op in OPS]


def checks_in(op, setting, settings):
    """The checks of `op` in this one of so many settings.

    Values and gradients are checked everywhere. Of all other checks an operation of no way of its own has each in one
    setting, one of `WAYS` in every second one, and the next operation has it in the next: every pair of check and
    setting is there. What is around a divergence, its reduction and the upstream gradient, is the same code for all.
    """
    around = (check_reductions, check_upstream) if op.name not in WAYS and not op.independent else ()
    place, apart = (WAYS.index(op.name), 2) if op.name in WAYS else (_NAMES.index(op.name), settings)
    others = [check for check in CHECKS if check not in (check_definition, *around)]
    return [
        check_definition,
        *(check for i, check in enumerate(others) if (place + setting + i) % apart == 0),
    ]
