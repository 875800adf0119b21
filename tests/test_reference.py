"""The definition itself: against torch.nn.functional, against numbers worked out by hand, and gradcheck in fp64."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from divergences import of_distributions, of_logits
from settings import WAYS

from duet_kernels import (
    LMHead,
    TopK,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    topk_distill_loss,
)
from duet_kernels.options import DISTRIBUTION, RAW
from duet_kernels.testing import OPS, make_problem

EXACT = {"rtol": 1e-12, "atol": 1e-13}
IMPLS = ("reference", "chunked")


@pytest.fixture(scope="module")
def problem():
    return make_problem(17, 101, 12, dtype=torch.float64, bias=True)


@pytest.fixture(scope="module")
def both_logits(problem):
    """Student and teacher logits, made by torch.nn.functional."""
    student = F.linear(problem.hidden, problem.weight, problem.bias)
    return student, F.linear(problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)


def _definition(name, s, t, temperature=1.0, beta=0.5, delta=1.0):
    """Rows of a divergence between logits at the same ids, by torch.nn.functional."""
    if name in RAW:
        return of_logits(name, s, t, delta=delta).sum(-1)
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    return of_distributions(name, log_q, log_p, beta=beta)


@pytest.mark.parametrize("impl", IMPLS)
class TestAgainstTorch:
    @pytest.mark.parametrize("name", RAW + DISTRIBUTION)
    def test_dense(self, problem, both_logits, impl, name):
        options = {"delta": 0.7} if name in RAW else {"temperature": 1.7, "beta": 0.2}
        got = linear_distill_loss(
            problem.hidden,
            problem.head,
            problem.teacher_hidden,
            problem.teacher_head,
            divergence=name,
            reduction="none",
            impl=impl,
            **options,
        )
        torch.testing.assert_close(got, _definition(name, *both_logits, **options), **EXACT)

    @pytest.mark.parametrize("name", RAW + DISTRIBUTION)
    def test_topk(self, problem, both_logits, impl, name):
        """renormalize is torch's divergence on the k columns alone."""
        options = {"delta": 0.7} if name in RAW else {"temperature": 1.7, "beta": 0.2}
        teacher = linear_topk(problem.teacher_hidden, problem.teacher_head, 9, impl=impl)
        got = topk_distill_loss(
            problem.hidden, problem.head, teacher, divergence=name, reduction="none", impl=impl, **options
        )
        columns = [z.gather(1, teacher.indices) for z in both_logits]
        torch.testing.assert_close(got, _definition(name, *columns, **options), **EXACT)

    @pytest.mark.parametrize("name", DISTRIBUTION)
    def test_tail(self, problem, both_logits, impl, name):
        """The tail bucket is one more category that holds everything else."""
        temperature = 1.7
        teacher = linear_topk(
            problem.teacher_hidden, problem.teacher_head, 9, temperature=temperature, impl=impl
        )
        got = topk_distill_loss(
            problem.hidden,
            problem.head,
            teacher,
            divergence=name,
            normalization="tail",
            temperature=temperature,
            beta=0.2,
            reduction="none",
            impl=impl,
        )
        rows = []
        for z in both_logits:
            x = z / temperature
            rest = x.scatter(1, teacher.indices, -torch.inf).logsumexp(1, keepdim=True)
            rows.append(torch.cat([x.gather(1, teacher.indices), rest], 1))
        torch.testing.assert_close(got, _definition(name, *rows, beta=0.2), **EXACT)

    @pytest.mark.parametrize("name", DISTRIBUTION)
    def test_tail_of_the_whole_vocabulary_is_dense(self, problem, impl, name):
        """k = V leaves an empty bucket, which contributes 0."""
        v = problem.head.num_ids
        sides = problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head
        options = {"divergence": name, "temperature": 1.3, "reduction": "none", "impl": impl}
        dense = linear_distill_loss(*sides, **options)
        for normalization in ("tail", "renormalize"):
            torch.testing.assert_close(
                linear_distill_loss(*sides, k=v, normalization=normalization, **options), dense, **EXACT
            )

    def test_sums_over_a_part_of_the_vocabulary(self, problem, both_logits, impl):
        temperature = 1.7
        teacher = linear_topk(
            problem.teacher_hidden, problem.teacher_head, 9, temperature=temperature, impl=impl
        )
        logq, logp = (F.log_softmax(z / temperature, -1).gather(1, teacher.indices) for z in both_logits)
        log_top = logp - logp.logsumexp(1, keepdim=True)
        wanted = {
            ("forward_kl", "zeroed"): (log_top.exp() * (log_top - logq)).sum(1),
            ("forward_kl", "truncated"): (logp.exp() * (logp - logq)).sum(1),
            ("reverse_kl", "truncated"): (logq.exp() * (logq - logp)).sum(1),
            ("forward_kl", "generalized"): (logp.exp() * (logp - logq) - logp.exp() + logq.exp()).sum(1),
            ("reverse_kl", "generalized"): (logq.exp() * (logq - logp) - logq.exp() + logp.exp()).sum(1),
        }
        for (divergence, normalization), rows in wanted.items():
            got = topk_distill_loss(
                problem.hidden,
                problem.head,
                teacher,
                divergence=divergence,
                normalization=normalization,
                temperature=temperature,
                reduction="none",
                impl=impl,
            )
            torch.testing.assert_close(got, rows, **EXACT)

    def test_cross_entropy(self, problem, both_logits, impl):
        labels = problem.labels.clone()
        labels[3::4] = -100
        call = {"hidden": problem.hidden, "head": problem.head, "labels": labels, "impl": impl}
        for reduction in ("mean", "sum", "none"):
            wanted = F.cross_entropy(both_logits[0], labels, reduction=reduction)
            torch.testing.assert_close(linear_cross_entropy(**call, reduction=reduction), wanted, **EXACT)
        other = linear_cross_entropy(
            problem.hidden, problem.head, labels.where(labels != -100, 5), ignore_index=5, impl=impl
        )
        wanted = F.cross_entropy(both_logits[0], labels.where(labels != -100, 5), ignore_index=5)
        torch.testing.assert_close(other, wanted, **EXACT)

    def test_primitives(self, problem, both_logits, impl):
        z = both_logits[0]
        top = linear_topk(problem.hidden, problem.head, 9, temperature=0.6, impl=impl)
        wanted = torch.topk(z, 9)
        torch.testing.assert_close(top.values, wanted.values, **EXACT)
        assert torch.equal(top.indices, wanted.indices)
        torch.testing.assert_close(top.logsumexp, torch.logsumexp(z / 0.6, -1), **EXACT)
        rest = z.scatter(1, wanted.indices, -torch.inf)
        torch.testing.assert_close(top.tail_logsumexp, torch.logsumexp(rest / 0.6, -1), **EXACT)
        torch.testing.assert_close(
            linear_gather(problem.hidden, problem.head, wanted.indices, impl=impl), wanted.values, **EXACT
        )
        torch.testing.assert_close(
            linear_logsumexp(problem.hidden, problem.head, temperature=0.6, impl=impl),
            torch.logsumexp(z / 0.6, -1),
            **EXACT,
        )

    def test_token_stats(self, problem, both_logits, impl):
        stats = linear_token_stats(problem.hidden, problem.head, problem.labels, impl=impl)
        distribution = torch.distributions.Categorical(logits=both_logits[0])
        torch.testing.assert_close(stats.logsumexp, both_logits[0].logsumexp(-1), **EXACT)
        torch.testing.assert_close(stats.entropy, distribution.entropy(), **EXACT)
        torch.testing.assert_close(stats.label_logprob, distribution.log_prob(problem.labels), **EXACT)
        mean = (distribution.probs * distribution.logits).sum(-1, keepdim=True)
        variance = (distribution.probs * (distribution.logits - mean).square()).sum(-1)
        torch.testing.assert_close(stats.logprob_variance, variance, **EXACT)

    def test_softcap_scale_and_vocab_size(self, problem, impl):
        head = LMHead(problem.weight, problem.bias, softcap=7.0, scale=0.25, vocab_size=64)
        z = 7.0 * torch.tanh(0.25 * F.linear(problem.hidden, problem.weight, problem.bias)[:, :64] / 7.0)
        labels = problem.labels.clamp(max=63)
        loss = linear_cross_entropy(problem.hidden, head, labels, impl=impl)
        torch.testing.assert_close(loss, F.cross_entropy(z, labels), **EXACT)
        top = linear_topk(problem.hidden, head, 4, impl=impl)
        torch.testing.assert_close(top.values, z.topk(4).values, **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
class TestByHand:
    """One token whose logits are given: h = 1, W = the logits."""

    def _loss(self, impl, student, values, indices, tail, **options):
        weight = torch.tensor(student, dtype=torch.float64)[:, None]
        teacher = TopK(
            torch.tensor([values]).double(), torch.tensor([indices]), torch.tensor([tail]).double()
        )
        return topk_distill_loss(
            torch.ones(1, 1, dtype=torch.float64), weight, teacher, impl=impl, **options
        ).item()

    def test_raw(self, impl):
        call = impl, [1.0, 5.0, -2.0], [0.5, 2.0], [0, 1], 0.0
        assert self._loss(*call) == pytest.approx(0.5 * 0.5**2 + (3.0 - 0.5))
        assert self._loss(*call, delta=4.0) == pytest.approx(0.5 * 0.5**2 + 0.5 * 3.0**2)
        assert self._loss(*call, divergence="mse") == pytest.approx(0.25 + 9)
        assert self._loss(*call, divergence="l1") == pytest.approx(3.5)

    def test_two_ids(self, impl):
        """q = (3/4, 1/4), p = (1/2, 1/2) over two ids; one more id has half of the student's, none of the teacher's."""
        log3 = math.log(3)
        call = impl, [log3, 0.0, math.log(4)], [0.0, 0.0], [0, 1], -math.inf
        forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
        reverse = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
        jsd = 0.5 * (0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)) + 0.5 * (
            0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
        )
        assert self._loss(*call, divergence="forward_kl") == pytest.approx(forward)
        assert self._loss(*call, divergence="reverse_kl") == pytest.approx(reverse)
        assert self._loss(*call, divergence="jsd") == pytest.approx(jsd)
        assert self._loss(*call, divergence="tvd") == pytest.approx(0.25)
        # With the bucket: q = (3/8, 1/8, 4/8), p = (1/2, 1/2, 0).
        tail = {"normalization": "tail"}
        wanted = 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.125)
        assert self._loss(*call, divergence="forward_kl", **tail) == pytest.approx(wanted)
        assert self._loss(*call, divergence="tvd", **tail) == pytest.approx(0.5)
        assert self._loss(*call, divergence="forward_kl", normalization="zeroed") == pytest.approx(wanted)
        # With a teacher that has half of its mass elsewhere: p = (1/4, 1/4).
        half = (*call[:4], math.log(2))
        wanted = 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(0.25 / 0.125)
        assert self._loss(*half, divergence="forward_kl", normalization="truncated") == pytest.approx(wanted)

    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
    def test_truncated_may_be_negative_and_generalized_not(self, impl, name):
        """One id whose probability differs: 1/3 and 0.987. The other one of the pair has too much of it."""
        high, low = [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        student, teacher = (high, low) if name == "forward_kl" else (low, high)
        call = impl, student, teacher[:1], [0], math.log(2)
        p, q = (math.exp(z[0]) / sum(map(math.exp, z)) for z in (teacher, student))
        first, second = (p, q) if name == "forward_kl" else (q, p)
        bare = first * math.log(first / second)
        assert (
            self._loss(*call, divergence=name, normalization="truncated") == pytest.approx(bare) and bare < 0
        )
        generalized = self._loss(*call, divergence=name, normalization="generalized")
        assert generalized == pytest.approx(bare + second - first) and generalized > 0

    def test_no_temperature_squared(self, impl):
        """Twice the temperature with twice the logits is the same loss: nothing is multiplied by T^2."""
        once = self._loss(impl, [1.0, 5.0, -2.0], [0.5, 2.0], [0, 1], 0.0, divergence="forward_kl")
        twice = self._loss(
            impl, [2.0, 10.0, -4.0], [1.0, 4.0], [0, 1], 0.0, divergence="forward_kl", temperature=2.0
        )
        assert twice == pytest.approx(once, rel=1e-14)


@pytest.mark.parametrize(
    "op, impl", [(op, impl) for op in OPS for impl in (IMPLS if op.name in WAYS else ["chunked"])], ids=str
)
def test_gradcheck(op, impl):
    """Finite differences in fp64, every leaf, with everything that an LMHead can do."""
    problem = make_problem(3, 13, 4, dtype=torch.float64, std=2.0, bias=True, softcap=9.0, scale=1.3, pad=2)
    problem = problem.requiring(problem.leaves)

    def function(hidden, weight, bias):
        return op.run(dataclasses.replace(problem, hidden=hidden, weight=weight, bias=bias), impl)

    leaves = problem.hidden, problem.weight, problem.bias
    # The whole Jacobian for the primitives, a random projection of it for what is built from them.
    assert torch.autograd.gradcheck(function, leaves, fast_mode=op.loss)


def test_the_gradient_of_an_infinite_huber_loss_is_its_bound():
    head = LMHead(torch.eye(2, dtype=torch.float64), torch.tensor([0.0, -torch.inf], dtype=torch.float64))
    hidden = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    top = TopK(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0, 1]]))
    for impl in ("reference", "chunked"):
        hidden.grad = None
        topk_distill_loss(
            hidden, head, top, divergence="huber", delta=2.0, reduction="sum", impl=impl
        ).backward()
        assert hidden.grad.tolist() == [[0.0, -2.0]]
