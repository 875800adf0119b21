"""Every divergence once more, by torch.nn.functional and apart from the package; and which ones there are, from its table.

A divergence that the package knows and this file does not is an error in every test that asks for it.
"""

import functools

import torch
import torch.nn.functional as F

from duet_kernels.options import DISTRIBUTION, DIVERGENCES, RAW

ALL = tuple(DIVERGENCES)
SIGNS = tuple(name for name in ALL if DIVERGENCES[name].noise)
# Of distributions, with a gradient that is no sign: they keep the digits of a student close to its teacher.
SMOOTH = tuple(name for name in DISTRIBUTION if name not in SIGNS)
# These are infinite where the student has mass and the teacher has none.
UNBOUNDED = ("reverse_kl", "symmetric_kl")
FORMS = [
    *((name, "none") for name in RAW),
    *((name, normalization) for name in DISTRIBUTION for normalization in DIVERGENCES[name].normalizations),
]


def certain_of_one_id(student, teacher, temperature=1.0, n=8, v=512, d=64):
    """(h, h of the teacher, W) in fp32 with logits near 0 but for one id: `student` and `teacher` times T."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    weight, base, gap = normal(v, d) / d**0.5, normal(n, d), normal(n, d)
    id_ = weight[300]

    def moved(h, logit):
        return temperature * (h + (logit - h @ id_)[:, None] * id_ / id_.square().sum())

    return moved(base, student), moved(base + 0.1 * gap, teacher), weight


def assert_digits_where_both_are_certain(name, gradients, margins, temperature):
    """`gradients(h, h of the teacher, W)` (dh, dW) of the sum against fp64: log_softmax of fp32 logits has no digit of some."""
    for student, teacher in margins:
        h, th, weight = certain_of_one_id(student, teacher, temperature)
        x, y = (z.double().requires_grad_() for z in (h, weight))
        log_q, log_p = ((z / temperature).log_softmax(-1) for z in (x @ y.T, th.double() @ weight.double().T))
        wanted = torch.autograd.grad(of_distributions(name, log_q, log_p).sum(), (x, y))
        for what, got, truth in zip(("dh", "dW"), gradients(h, th, weight), wanted, strict=True):
            error = (got.double() - truth).norm() / truth.norm()
            assert error <= 2e-5, (what, student, teacher, error)


def of_logits(name, s, t, *, delta=1.0, noise=0.0):
    """The terms of rows of logits; differences within the noise count as 0."""
    none = {"reduction": "none"}
    return {
        "huber": lambda: F.huber_loss(s, t, delta=delta, **none),
        "mse": lambda: F.mse_loss(s, t, **none),
        "l1": lambda: F.l1_loss(s, t, **none).where((s - t).abs() > noise, 0.0),
    }[name]()


def of_distributions(name, log_q, log_p, *, beta=0.5, noise=0.0, nonnegative=False):
    """The sum of rows of log-probabilities of the student (q) and the teacher (p).

    With `nonnegative` KL(a || b) has b - a added to each of its terms.
    """
    p, q = log_p.exp(), log_q.exp()

    def kl(a, b):
        terms = F.kl_div(b, a, log_target=True, reduction="none").where(a > -torch.inf, 0.0)
        return (terms + b.exp() - a.exp() if nonnegative else terms).sum(-1)

    def mixed():
        log_m = (beta * p + (1 - beta) * q).log()
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)

    return {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "symmetric_kl": lambda: beta * kl(log_p, log_q) + (1 - beta) * kl(log_q, log_p),
        "jsd": mixed,
        "tvd": lambda: 0.5 * (p - q).abs().where((log_p - log_q).abs() > noise, 0.0).sum(-1),
    }[name]()
