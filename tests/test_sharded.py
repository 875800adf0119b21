"""Heads whose rows lie on several processes: the results, gradients and errors of one process (gloo, CPU)."""

import json

import pytest
import ranks_at_work
import torch
import torch.distributed as dist
from forks import ended_by, forked
from sweeps import case
from tiny_models import tiny

from duet.model.lm import check_head
from duet_kernels import (
    LMHead,
    TopK,
    functional,
    linear_cross_entropy,
    linear_distill_loss,
    topk_distill_loss,
)
from duet_kernels.options import loss_tokens

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)


@pytest.mark.parametrize(
    "part",
    [case(part, slow=part == "two") for part in ranks_at_work.CHECKED],
)
def test_ranks(part, tmp_path):
    """All checks of a part of `ranks_at_work.py`, in processes that are split off once."""
    ranks = range(ranks_at_work.RANKS[part])
    children = [forked(lambda rank=rank: ranks_at_work.check(rank, tmp_path, part)) for rank in ranks]
    for child in children:
        ended_by(child)
    for rank in ranks:
        file = tmp_path / f"{part}-{rank}.json"
        said = json.loads(file.read_text()) if file.exists() else {}
        failed = {name: failure for name, (failure, _) in said.items() if failure}
        assert not failed, f"rank {rank}, " + "".join(
            f"{name}: {failure}" for name, failure in failed.items()
        )
        assert said.keys() == ranks_at_work.CHECKED[part].keys(), (
            f"rank {rank} ended before it had checked everything"
        )


# --- one rank is enough --------------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_teacher_that_was_written_into_is_refused(alone, sharded):
    group = alone if sharded else None
    hidden, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    student = LMHead(torch.randn(30, 8, requires_grad=True), group=group)
    head = LMHead(torch.randn(30, 8), group=group)
    losses = linear_distill_loss(hidden, student, teacher, head, divergence="forward_kl", reduction="none")
    teacher.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_a_masked_row_that_stays_has_no_ids(alone, monkeypatch):
    """Of a sharded head, where leaving it out would be a synchronisation."""
    monkeypatch.setattr(functional, "loss_tokens", lambda *args: loss_tokens(*args[:-1], "reference"))
    weight, bias = torch.randn(30, 8, requires_grad=True), torch.zeros(30)
    bias[3] = -torch.inf
    ids = torch.tensor([[4, 5], [3, 6]])  # the second row's first id has a logit of -inf
    top = TopK(torch.randn(2, 2), ids, torch.ones(2))
    head, mask = LMHead(weight, bias, group=alone), torch.tensor([True, False])
    topk_distill_loss(torch.randn(2, 8), head, top, divergence="mse", mask=mask).backward()
    assert weight.grad.isfinite().all()


def test_the_compiler_breaks_its_graph_around_a_sharded_head(alone):
    head, labels = LMHead(torch.randn(30, 8), group=alone), torch.arange(5)
    hidden = torch.randn(5, 8, requires_grad=True)

    def loss(hidden):
        return 2 * linear_cross_entropy(hidden * 2, head, labels)

    wanted = torch.autograd.grad(loss(hidden), hidden)[0]
    compiled = torch.compile(loss, backend="aot_eager")(hidden)
    assert torch.equal(torch.autograd.grad(compiled, hidden)[0], wanted)

    def whole(hidden):
        return linear_cross_entropy(hidden, head, labels)

    with pytest.raises(Exception, match=r"head\.group.*fullgraph=False"):
        torch.compile(whole, backend="aot_eager", fullgraph=True)(hidden)


def test_the_trainer_takes_whole_models_only(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"^model: .*1 ranks.*accelerate"):
        check_head(model)
