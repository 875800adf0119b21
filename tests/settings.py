"""Which checks of the contract an operation is put to in which of several settings (a dtype, a head)."""

from duet_kernels.testing import CHECKS, OPS, check_definition

# One of each way through the code: all checks in every setting.
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
    setting, and the next operation has it in the next one: every pair of operation, check and setting is there.
    """
    if op.name in WAYS:
        return CHECKS
    place = _NAMES.index(op.name) + setting
    others = [check for check in CHECKS if check is not check_definition]
    return [check_definition, *(check for i, check in enumerate(others) if (place + i) % settings == 0)]
