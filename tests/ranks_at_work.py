"""What the processes of `test_sharded.py` run: checks that all ranks make in one order, each writing down what failed.

The ranks meet through a file in the folder that they are given.
"""

import dataclasses
import datetime
import importlib.util
import json
import os
import re
import time
import traceback
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duet_kernels import (
    LMHead,
    TopK,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    ranks,
    set_workspace_bytes,
    topk_distill_loss,
    topk_distill_stats,
)
from duet_kernels.testing import (
    CHECKS,
    OPS,
    assert_within_budget,
    check_definition,
    make_problem,
)
from duet_kernels.testing.problems import Problem

FULL = {"bias": True, "softcap": 20.0, "scale": 1.3, "pad": 5}
UNEVEN = {2: (130, 78), 4: (70, 0, 135, 3)}  # of 208 rows, the last 5 of which are padding
BY_NAME = {op.name: op for op in OPS}
# One of each way through the code; of all others values and gradients are checked.
SAMPLED = ("gather", "cross-entropy", "topk-huber", "topk-forward_kl-tail", "linear-jsd")
RANKS = {"two": 2, "four": 4}  # of each part
CHECKED = {part: {} for part in RANKS}  # part -> name -> what every rank of it runs


def in_part(part):
    def keep(function):
        CHECKED[part][function.__name__] = function
        return function

    return keep


# --- the contract, on shards --------------------------------------------------------------------------------------


def own(x, counts):
    rank = dist.get_rank()
    return None if x is None else x[sum(counts[:rank]) : sum(counts[: rank + 1])]


def own_rows(head, counts, group=None):
    """This rank's rows of a whole head."""
    weight, bias = own(head.weight, counts), own(head.bias, counts)
    return dataclasses.replace(head, weight=weight, bias=bias, group=group or dist.group.WORLD, shards=counts)


@dataclasses.dataclass(frozen=True, eq=False)
class Sharded(Problem):
    """A problem whose leaves are whole, so that their gradients (summed over the ranks) can be judged; its heads are not."""

    counts: tuple[int, ...] = ()
    shard_teacher: bool = True

    @property
    def head(self):
        whole = Problem.head.fget(self)
        weight = ranks.replicated(whole.weight, dist.group.WORLD)
        bias = None if whole.bias is None else ranks.replicated(whole.bias, dist.group.WORLD)
        return own_rows(dataclasses.replace(whole, weight=weight, bias=bias), self.counts)

    @property
    def teacher_head(self):
        whole = Problem.teacher_head.fget(self)
        return own_rows(whole, self.counts) if self.shard_teacher else whole

    def teacher_topk(self, k=8, temperature=1.0):
        return Problem(**fields(self)).teacher_topk(k, temperature)


def fields(problem):
    return {field.name: getattr(problem, field.name) for field in dataclasses.fields(Problem)}


def on_shards(op, shard_teacher=True):
    """The operation on this rank's rows; its definition is the operation in one process."""
    counts = UNEVEN[dist.get_world_size()]

    def call(problem, **options):
        return op.call(Sharded(**fields(problem), counts=counts, shard_teacher=shard_teacher), **options)

    def define(problem, **options):
        return op.call(problem, impl="reference", **options)

    return dataclasses.replace(op, call=call, definition=define)


def contract(op, checks, shard_teacher=True, lead=11, **options):
    problem = make_problem(lead, 203, 24, **FULL, **options)
    for check in checks:
        check(on_shards(op, shard_teacher), problem, "chunked")


for _op in OPS:
    _checks = CHECKS if _op.name in SAMPLED else [check_definition]
    CHECKED["two"][f"contract of {_op}"] = lambda op=_op, checks=_checks: contract(op, checks)
    # Top-k losses see of the shards what is gathered, whatever their divergence is: four ranks, one of them without rows, have a few.
    if _op.name in SAMPLED or not _op.name.startswith("topk-"):
        CHECKED["four"][f"definition of {_op}"] = lambda op=_op: contract(op, [check_definition])


@in_part("two")
def other_dtypes_and_a_whole_teacher():
    for name in (*SAMPLED, "linear-l1", "linear-huber", "linear-jsd-union-tail"):
        contract(BY_NAME[name], [check_definition], dtype=torch.bfloat16, lead=16)
    contract(BY_NAME["linear-reverse_kl"], [check_definition], dtype=torch.float16, lead=16)
    problem, whole, part = both_heads(**FULL, dtype=torch.float64)
    one, two = (
        linear_distill_loss(problem.hidden, h, problem.hidden / 2, h, divergence="jsd") for h in (whole, part)
    )
    torch.testing.assert_close(two, one, rtol=1e-13, atol=0)
    one, two = (linear_topk(problem.hidden, h, 9) for h in (whole, part))
    assert torch.equal(one.indices, two.indices) and two.values.dtype == torch.float64
    torch.testing.assert_close(two.values, one.values, rtol=1e-13, atol=1e-13)
    for name in ("linear-mse", "linear-reverse_kl", "linear-tvd", "linear-forward_kl-teacher-tail"):
        contract(BY_NAME[name], [check_definition], shard_teacher=False)


# --- values without a gradient -------------------------------------------------------------------------------------


def both_heads(**options):
    """(the problem, its head in one process, this rank's rows of it)"""
    problem = make_problem(19, 203, 24, **options)
    whole, counts = problem.head, []
    for rows in UNEVEN[dist.get_world_size()]:
        counts.append(min(rows, len(whole.weight) - sum(counts)))
    return problem, whole, own_rows(whole, tuple(counts))


@in_part("two")
@in_part("four")
def selections_are_those_of_one_process():
    for ties in (None, "quantised"):
        problem, whole, part = both_heads(ties=ties)
        assert part.num_ids == 203
        for k in (7, 203):
            one = linear_topk(problem.hidden, whole, k, temperature=0.7)
            two = linear_topk(problem.hidden, part, k, temperature=0.7)
            assert torch.equal(one.indices, two.indices), (ties, k)
            torch.testing.assert_close(two.values, one.values, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(two.tail_logsumexp, one.tail_logsumexp, rtol=1e-5, atol=1e-5)
    problem, whole, part = both_heads(**FULL, dtype=torch.bfloat16)
    assert part.num_ids == 203
    top = linear_topk(problem.hidden, part, 9)
    assert torch.equal(top.indices, linear_topk(problem.hidden, whole, 9).indices)
    hidden = problem.hidden.index_fill(0, torch.tensor([3]), torch.nan)
    broken = linear_topk(hidden, part, 9)
    assert broken.values[3].isnan().all() and torch.equal(broken.indices[4:], top.indices[4:])


@in_part("two")
@in_part("four")
def ids_that_are_ruled_out():
    """A bias of -inf, on some ids of each rank and on all of one."""
    problem, whole, part = both_heads(bias=True)
    bias = whole.bias.clone()
    bias[:130] = -torch.inf
    whole = dataclasses.replace(whole, bias=bias)
    part = own_rows(whole, part.shards)
    for k in (5, 73, 90):
        one, two = (linear_topk(problem.hidden, head, k) for head in (whole, part))
        assert torch.equal(one.indices, two.indices)
        torch.testing.assert_close(two.tail_logsumexp, one.tail_logsumexp, rtol=1e-6, atol=1e-5)
    one, two = (linear_token_stats(problem.hidden, head, problem.labels) for head in (whole, part))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5)
    alone = dataclasses.replace(whole, bias=torch.full_like(bias, -torch.inf))  # no distribution at all
    one = linear_token_stats(problem.hidden, alone, problem.labels)
    two = linear_token_stats(problem.hidden, own_rows(alone, part.shards), problem.labels)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))
    rest = torch.arange(130, 203).expand(19, -1)
    hidden = problem.hidden.clone().requires_grad_()
    nothing = linear_logsumexp(hidden, part, exclude=rest)
    assert (nothing == -torch.inf).all()
    nothing.sum().backward()
    assert (hidden.grad == 0).all()


@in_part("two")
@in_part("four")
def statistics_within_the_budget():
    for options in (FULL, {"std": 12.0}):
        problem, whole, part = both_heads(**options)
        labels = problem.labels.clone()
        labels[::5] = -100
        exact = linear_token_stats(
            problem.hidden.double(), _double(whole), labels, ignore_index=-100, impl="reference"
        )
        one = linear_token_stats(problem.hidden, whole, labels, ignore_index=-100, impl="reference")
        two = linear_token_stats(problem.hidden, part, labels, ignore_index=-100)
        for name, a, b, truth in zip(one._fields, two, one, exact, strict=True):
            assert_within_budget(a, truth, b, name=name)


def _double(head):
    bias = None if head.bias is None else head.bias.double()
    return dataclasses.replace(head, weight=head.weight.double(), bias=bias)


@in_part("two")
def an_almost_certain_token_keeps_its_digits():
    weight = torch.zeros(6, 2, dtype=torch.float32)
    weight[1, 0], weight[4, 1] = 40.0, 1.0
    hidden = torch.tensor([[1.0, 0.0], [1.0, 30.0]])
    labels = torch.tensor([1, 1])
    one = linear_token_stats(hidden, weight, labels)
    assert 0 < one.entropy[0] < 1e-15 and -1e-16 < one.label_logprob[0] < 0
    part = LMHead(own(weight, (3, 3)), group=dist.group.WORLD)
    for a, b in zip(linear_token_stats(hidden, part, labels), one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@in_part("two")
@in_part("four")
def every_statistic_of_a_loss():
    problem, whole, part = both_heads(**FULL)
    teacher = problem.teacher_topk(8, 1.5)
    teacher.indices[:, 5] = teacher.indices[:, 4]  # an id that is met twice
    ragged = teacher._replace(values=teacher.values.clone())
    ragged.values[::3, 6:] = -torch.inf
    mask = torch.arange(19) % 4 != 1
    wanted = {
        "token_ids": problem.labels,
        "student_mass": True,
        "entropy": True,
        "overlap": True,
        "mask": mask,
    }
    for given in (teacher, ragged):
        for options in (
            {"divergence": "forward_kl", "normalization": "tail", "temperature": 1.5},
            {"divergence": "reverse_kl", "temperature": 1.5},
        ):
            one = topk_distill_stats(problem.hidden, whole, given, **options, **wanted)
            two = topk_distill_stats(problem.hidden, part, given, **options, **wanted)
            for name, a, b in zip(one._fields, two, one, strict=True):
                torch.testing.assert_close(
                    a, b, rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
                )
    bare = topk_distill_stats(problem.hidden, part, teacher, student_mass=True)
    whole_bare = topk_distill_stats(problem.hidden, whole, teacher, student_mass=True)
    torch.testing.assert_close(bare.student_mass, whole_bare.student_mass)
    # What is not differentiated may not leave the ranks waiting for each other.
    hidden = problem.hidden.clone().requires_grad_()
    stats = topk_distill_stats(hidden, part, teacher, token_ids=problem.labels, divergence="reverse_kl")
    stats.loss.sum().backward()
    assert hidden.grad.abs().sum() > 0


@in_part("two")
@in_part("four")
def no_tokens_and_no_gradients():
    problem, _, part = both_heads(**FULL)
    weight = part.weight.clone().requires_grad_()
    head = dataclasses.replace(part, weight=weight)
    hidden = problem.hidden.clone().requires_grad_()
    for rows in (slice(0, 0), slice(0, 3)):
        mask = torch.zeros(len(hidden[rows]), dtype=torch.bool)
        teacher = problem.teacher_topk(4)
        teacher = TopK(*(x[rows] for x in teacher[:3]))
        losses = [
            linear_cross_entropy(hidden[rows], head, torch.full((len(mask),), -100)),
            topk_distill_loss(hidden[rows], head, teacher, mask=mask),
            linear_distill_loss(hidden[rows], head, hidden[rows].detach(), head, divergence="jsd", mask=mask),
        ]
        for loss in losses:
            loss.backward()
            assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, problem.labels).requires_grad


@in_part("two")
def kernels_of_each_rank():
    """Triton's interpreter: ids of another rank are absent slots, and rows may be few."""
    if importlib.util.find_spec("triton") is None:
        return
    problem = make_problem(3, 43, 11, bias=True)
    part = own_rows(problem.head, (42, 1))
    teacher = problem.teacher_topk(4)
    options = {"divergence": "forward_kl", "normalization": "tail"}
    calls = (
        lambda h, impl: linear_topk(h, part, 4, impl=impl).tail_logsumexp,
        lambda h, impl: linear_token_stats(h, part, problem.labels, impl=impl).entropy,
        lambda h, impl: linear_logsumexp(h, part, exclude=teacher.indices, impl=impl),
        lambda h, impl: topk_distill_loss(h, part, teacher, impl=impl, **options),
    )
    for call in calls:
        hidden = [problem.hidden.clone().requires_grad_() for _ in range(2)]
        results = [call(h, impl) for h, impl in zip(hidden, ("chunked", "triton"), strict=True)]
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
        if results[0].requires_grad:
            for result in results:
                result.sum().backward()
            torch.testing.assert_close(hidden[1].grad, hidden[0].grad, rtol=1e-4, atol=1e-6)


# --- what is sent --------------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank gives to collective operations, and the elements of the largest tensor it makes."""

    bytes = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = args[1] if "gather" in func._schema.name else args[0]  # allgather_(outputs, inputs, ...)
            self.bytes += sum(x.nbytes for x in tree_leaves(given) if isinstance(x, torch.Tensor))
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return made


@in_part("two")
def bytes_do_not_depend_on_the_vocabulary():
    """Exactly N (2 K + 1) numbers for a top-k, some N or N K for the others, N D backward, and 256 bytes of agreement."""
    n, d, k, agreement = 12, 16, 5, 256
    for v in (64, 640):
        problem = make_problem(n, v, d)
        for name, (numbers, backward, call) in calls_by_numbers(problem, k).items():
            hidden = problem.hidden.clone().requires_grad_(backward)
            with Sent() as forward:
                result = call(hidden)
            assert forward.bytes == agreement + 4 * n * numbers, (name, v, forward.bytes)
            if backward:
                with Sent() as back:
                    result.sum().backward()
                assert back.bytes == 4 * n * d, (name, v, back.bytes)


@in_part("two")
def no_logits_of_all_tokens():
    n, v = 256, 4096
    problem, before = make_problem(n, v, 8), set_workspace_bytes(2**20)
    calls = calls_by_numbers(problem, 5)
    for name in ("top-k", "cross-entropy", "token stats", "with a tail", "jsd"):
        _, backward, call = calls[name]
        hidden = problem.hidden.clone().requires_grad_(backward)
        with Sent() as sent:
            result = call(hidden)
            if backward:
                result.sum().backward()
        assert sent.largest < n * v // 8, (name, sent.largest)  # half of the logits of the smaller shard
    set_workspace_bytes(before)


def calls_by_numbers(problem, k):
    """name -> (numbers that each token sends forward, whether there is a backward pass, the call)"""
    v = len(problem.weight)
    part, teacher_part = (own_rows(x, (v // 4, v - v // 4)) for x in (problem.head, problem.teacher_head))
    teacher, labels = problem.teacher_topk(k), problem.labels
    tail = {"divergence": "forward_kl", "normalization": "tail"}
    stats = tail | {"token_ids": labels, "entropy": True}

    def dense(divergence):
        live = problem.teacher_hidden, teacher_part
        return lambda h: linear_distill_loss(h, part, *live, divergence=divergence)

    return {
        "top-k": (2 * k + 1, False, lambda h: linear_topk(h, part, k).values),
        "gather": (k, True, lambda h: linear_gather(h, part, teacher.indices)),
        "log-sum-exp": (1, True, lambda h: linear_logsumexp(h, part, exclude=teacher.indices)),
        "cross-entropy": (2, True, lambda h: linear_cross_entropy(h, part, labels)),
        "token stats": (4, False, lambda h: linear_token_stats(h, part, labels).entropy),
        "top-k loss": (k, True, lambda h: topk_distill_loss(h, part, teacher)),
        "with a tail": (k + 1, True, lambda h: topk_distill_loss(h, part, teacher, **tail)),
        "stats": (k + 3, True, lambda h: topk_distill_stats(h, part, teacher, **stats).loss),
        "huber": (1, True, dense("huber")),
        "l1": (3, True, dense("l1")),
        "jsd": (4, True, dense("jsd")),
        "tvd": (5, True, dense("tvd")),
    }


# --- what is refused -----------------------------------------------------------------------------------------------


def refused(kind, pattern, call):
    try:
        call()
    except kind as error:
        assert re.search(pattern, str(error)), f"{pattern!r} is not in: {error}"
        return
    raise AssertionError(f"nothing was refused: wanted {pattern!r}")


@in_part("two")
def what_is_refused():
    rank, world = dist.get_rank(), dist.group.WORLD
    problem, whole, part = both_heads(**FULL)
    hidden, labels = problem.hidden, problem.labels
    mine = hidden if rank == 0 else hidden.flip(0)
    fewer = slice(0, 19 - rank)
    refused(ValueError, r"^hidden: .*gather_tokens", lambda: linear_cross_entropy(mine, part, labels))
    refused(ValueError, r"^hidden: .*\[19, 18\] tokens", lambda: linear_topk(hidden[fewer], part, 3))
    refused(ValueError, r"^labels: ", lambda: linear_cross_entropy(hidden, part, (labels + rank) % 203))
    refused(ValueError, r"^head.group: .*linear_topk", lambda: linear_topk(hidden, part, 3 + rank))
    teacher = problem.teacher_topk(4)
    shifted = teacher._replace(values=teacher.values + rank)
    refused(ValueError, r"^teacher\.values: ", lambda: topk_distill_loss(hidden, part, shifted))
    for counted in (
        lambda: linear_cross_entropy(hidden, part, labels, num_items=9 + rank),
        lambda: topk_distill_loss(hidden, part, teacher, weights=torch.ones(19) + rank),
        lambda: topk_distill_loss(hidden, part, teacher, mask=torch.arange(19) != 9 * rank),
    ):
        words = r"^num_items, weights, mask: .*num_items is the count over all ranks"
        # A CPU leaves masked tokens out: the hidden states differ first.
        refused(ValueError, rf"{words}|^hidden: ", counted)
    leaf = hidden.clone().requires_grad_(rank == 0)
    refused(ValueError, r"^head.group: ", lambda: linear_logsumexp(leaf, part))
    refused(ValueError, r"^impl: ", lambda: linear_topk(hidden, part, 3, impl="reference"))
    refused(ValueError, r"^labels: ", lambda: linear_cross_entropy(hidden, part, torch.full((19,), 203)))
    refused(ValueError, r"^k: .*203", lambda: linear_topk(hidden, part, 204))
    states = problem.teacher_hidden
    refused(ValueError, r"^student_head: ", lambda: linear_distill_loss(hidden, whole, states, part))
    other = own_rows(problem.teacher_head, (100, 108))
    refused(ValueError, r"^teacher_head: .*ids", lambda: linear_distill_loss(hidden, part, states, other))
    again = dataclasses.replace(own_rows(problem.teacher_head, part.shards), group=dist.new_group([0, 1]))
    assert linear_distill_loss(hidden, part, states, again).isfinite()  # the same ranks in another group
    alone = [dist.new_group([one]) for one in (0, 1)][rank]
    other = dataclasses.replace(problem.teacher_head, group=alone, shards=None)
    refused(ValueError, r"^teacher_head: .*group", lambda: linear_distill_loss(hidden, part, states, other))
    weight = part.weight
    refused(TypeError, r"^head.group: ", lambda: LMHead(weight, group=0))
    refused(TypeError, r"^head.group: ", lambda: LMHead(weight, group=dist.GroupMember.NON_GROUP_MEMBER))
    refused(ValueError, r"^head.shards: ", lambda: LMHead(weight, group=world, shards=(1, 2)))
    refused(ValueError, r"^head.shards: ", lambda: LMHead(weight, shards=(1, 2)))
    for shards in ((130.0, 78.0), ("130", 78), 208):
        refused(
            TypeError,
            r"^head.shards: wanted an integer",
            lambda s=shards: LMHead(weight, group=world, shards=s),
        )
    told = (len(weight), 70) if rank == 0 else (120, len(weight))  # each is right about its own
    other = dataclasses.replace(part, shards=told, vocab_size=198)
    refused(ValueError, r"^head.group: .*ids of each rank: \[", lambda: linear_topk(hidden, other, 3))
    refused(ValueError, r"^head.vocab_size: .*208", lambda: LMHead(weight, group=world, vocab_size=209))
    refused(ValueError, r"^head.group: ", lambda: whole.gather_tokens(hidden))


@in_part("two")
def shapes_and_teachers_of_another_vocabulary():
    """Leading shapes, autocast, a teacher with a smaller vocabulary, and a student in one process with a sharded teacher."""
    problem = make_problem((3, 5), 60, 8, teacher_v=50, teacher_d=6)
    part, teacher = own_rows(problem.head, (20, 40)), own_rows(problem.teacher_head, (20, 30))
    for options in ({"divergence": "jsd"}, {"k": 4, "support": "union"}, {"divergence": "huber"}):
        one, two = (
            linear_distill_loss(problem.hidden, s, problem.teacher_hidden, t, reduction="none", **options)
            for s, t in ((problem.head, problem.teacher_head), (part, teacher))
        )
        assert two.shape == (3, 5)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    mixed = linear_distill_loss(problem.hidden, problem.head, problem.teacher_hidden, teacher, k=4)
    one = linear_distill_loss(problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head, k=4)
    torch.testing.assert_close(mixed, one)
    half = dataclasses.replace(part, weight=part.weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_cross_entropy(problem.hidden, half, problem.labels).dtype == torch.float32


# --- DTensor, FSDP2 ------------------------------------------------------------------------------------------------


@in_part("two")
def rows_of_a_dtensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    problem = make_problem(19, 203, 24, bias=True, pad=4)
    mesh = init_device_mesh("cpu", (2,))
    whole = problem.requiring(problem.leaves)
    one = linear_cross_entropy(whole.hidden, whole.head, problem.labels)
    one.backward()
    weight, bias = (
        distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (problem.weight, problem.bias)
    )
    hidden = problem.hidden.clone().requires_grad_()
    head = LMHead(weight, bias, vocab_size=203)
    assert head.num_ids == 203 and head.shards == (104, 103)
    two = linear_cross_entropy(hidden, head, problem.labels)
    two.backward()
    torch.testing.assert_close(two, one)
    torch.testing.assert_close(hidden.grad, whole.hidden.grad, rtol=1e-5, atol=1e-6)
    assert weight.grad.placements == weight.placements
    torch.testing.assert_close(weight.grad.full_tensor(), whole.weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.grad.full_tensor(), whole.bias.grad, rtol=1e-5, atol=1e-6)
    for placement in (Replicate(), Shard(1)):
        other = distribute_tensor(problem.weight, mesh, [placement])
        refused(ValueError, r"^head.weight: .*Shard\(0\)", lambda other=other: LMHead(other))
    refused(TypeError, r"^head.bias: ", lambda: LMHead(weight, problem.bias))
    parts = distribute_tensor(problem.hidden, mesh, [Shard(0)])
    refused(TypeError, r"^hidden: .*full_tensor", lambda: linear_topk(parts, head, 3))
    refused(ValueError, r"^head.group: ", lambda: LMHead(weight, group=dist.group.WORLD))
    refused(ValueError, r"^head.shards: the DTensor", lambda: LMHead(weight, shards=(104, 103)))


class Model(nn.Module):
    """Layers and a head: what `LMHead.of` reads of a causal language model."""

    class config:
        model_type, vocab_size = "llama", 21

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Embedding(21, 8), nn.Linear(8, 8), nn.Tanh())
        self.lm_head = nn.Linear(8, 21, bias=False)

    def get_output_embeddings(self):
        return self.lm_head


class Distilled(nn.Module):
    """What docs/distil.md gives to DDP: its forward pass returns the loss."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, ids, target, **options):
        return topk_distill_loss(self.student.model(ids), LMHead.of(self.student), target, **options)


@in_part("two")
@in_part("four")
def a_model_under_ddp_with_tokens_of_its_own_on_each_rank():
    """Backbone and head have the gradient of one process; `num_items` is the mean over the ranks, here a fraction."""
    counts = {2: (9, 5), 4: (3, 6, 1, 4)}[dist.get_world_size()]
    ids, mask = torch.arange(14) % 21, torch.arange(14) % 5 != 1
    target = linear_topk(torch.eye(14, 8), Model().lm_head.weight, 4)
    one, two, options = Model(), Model(), {"divergence": "forward_kl", "normalization": "tail"}
    topk_distill_loss(one.model(ids), LMHead.of(one), target, mask=mask, **options).backward()
    target, options["num_items"] = TopK(*(own(x, counts) for x in target[:3])), 11 / len(counts)
    ddp = nn.parallel.DistributedDataParallel(Distilled(two))
    ddp(own(ids, counts), target, mask=own(mask, counts), **options).backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6, msg=name)


@in_part("two")
def a_model_under_fsdp2_with_tokens_of_its_own_on_each_rank():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ids, labels = torch.arange(14) % 21, torch.arange(3, 17)
    cut = slice(0, 9) if dist.get_rank() == 0 else slice(9, 14)
    one, two, mesh = Model(), Model(), init_device_mesh("cpu", (2,))
    fully_shard(two.model, mesh=mesh)
    fully_shard(two.lm_head, mesh=mesh)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (one, two)]
    for _ in range(2):
        loss = linear_cross_entropy(one.model(ids), LMHead.of(one), labels)
        loss.backward()
        hidden, head = two.model(ids[cut]), LMHead.of(two)
        assert head.shards == (11, 10)
        hidden, own_labels = head.gather_tokens(hidden), head.gather_tokens(labels[cut])
        assert torch.equal(own_labels, labels)
        again = linear_cross_entropy(hidden, head, own_labels)
        again.backward()
        torch.testing.assert_close(again, loss)
        for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(b.grad.full_tensor(), a.grad, rtol=1e-5, atol=1e-6, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    refused(ValueError, r"^head.group: ", lambda: LMHead.verify(two, ids))


@in_part("two")
def tokens_are_gathered_with_their_own_gradient():
    head = LMHead(torch.zeros(2, 3), group=dist.group.WORLD)
    rank, n = dist.get_rank(), (2, 5)[dist.get_rank()]
    top = TopK(torch.zeros(n, 2), torch.full((n, 2), rank), temperature=2.0)
    everyone = head.gather_tokens(top)
    assert everyone.indices[:, 0].tolist() == [0] * 2 + [1] * 5 and everyone.values.shape == (7, 2)
    assert everyone.tail_logsumexp is None and everyone.temperature == 2.0
    for averaged, factor in ((True, 2.0), (False, 1.0)):
        x = torch.full((n, 3), float(rank), requires_grad=True)
        everything = head.gather_tokens(x, averaged=averaged)
        assert everything[:, 0].tolist() == [0.0] * 2 + [1.0] * 5
        (everything * torch.arange(7)[:, None]).sum().backward()
        wanted = factor * torch.arange(7.0)[:2] if rank == 0 else factor * torch.arange(7.0)[2:]
        assert torch.equal(x.grad, wanted[:, None].expand(n, 3))
        values = torch.zeros(n, 2, requires_grad=True)
        head.gather_tokens(top._replace(values=values), averaged=averaged).values.sum().backward()
        assert torch.equal(values.grad, torch.full((n, 2), factor))


@in_part("two")
def tokens_that_cannot_be_gathered_are_refused_on_every_rank():
    """Before anything is exchanged that would have another size, or other bytes: all ranks go on together."""
    head, rank = LMHead(torch.zeros(2, 3), group=dist.group.WORLD), dist.get_rank()
    top = TopK(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4), temperature=2.0)
    pairs = {
        r"x float64 \[4, 2\] on rank 0; x int64 \[4, 2\] on rank 1": (
            torch.zeros(4, 2).double(),
            top.indices,
        ),
        r"x float32 \[2, 6\] on rank 0; x float32 \[2, 3, 2\] on rank 1": (
            torch.zeros(2, 6),
            torch.zeros(2, 3, 2),
        ),
        r"x bfloat16 .* x float16 ": (torch.zeros(4).bfloat16(), torch.zeros(4).half()),
        r"tail_logsumexp float32 \[4\] on rank 0; a TopK [^;]*indices int64 \[4, 2\] on rank 1": (
            top,
            top._replace(tail_logsumexp=None),
        ),
        r"of logits at temperature 2.0.* of logits at temperature 1.0": (top, top._replace(temperature=1.0)),
        r"of log-probabilities at": (top._replace(log_probabilities=True), top),
        r"on rank 0; x float32 \[4\] on rank 1": (top, torch.zeros(4)),
        r"x float32 \[\] on rank 0; ": (torch.zeros(()), torch.zeros(4)),
    }
    for words, given in pairs.items():
        refused(ValueError, rf"^x: .*{words}", lambda given=given: head.gather_tokens(given[rank]))
        assert head.gather_tokens(torch.full((1,), rank)).tolist() == [0, 1]  # nobody is a call behind
    refused(
        TypeError, r"^x: .*got torch.int16", lambda: head.gather_tokens(torch.zeros(4, dtype=torch.int16))
    )


# --- a rank that dies: the last check of its part ------------------------------------------------------------------


@in_part("two")
def a_rank_that_is_late_or_dead_is_an_error():
    problem, whole, _ = both_heads()
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=1))
    part = own_rows(whole, (130, 73), group)
    if dist.get_rank() == 1:
        return  # it never calls
    began = time.time()
    refused(RuntimeError, r"^head.group: rank 0 of 2 waited", lambda: linear_topk(problem.hidden, part, 3))
    assert time.time() - began < 20


def check(rank: int, folder: Path, part: str) -> None:
    """What the process of a rank does: the checks of a part, one after the other, then it ends."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    init = {"init_method": f"file://{folder / part}", "timeout": timeout}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS[part], **init)
    results = {}
    for name, function in CHECKED[part].items():
        began = time.time()
        try:
            function()
            failure = ""
        except BaseException:
            failure = traceback.format_exc()
        results[name] = [failure, round(time.time() - began, 3)]
        if failure:
            break  # the other ranks are in another place
    (folder / f"{part}-{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # without the goodbyes of a group in which a rank is missing
