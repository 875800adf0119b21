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
from duet_kernels import LMHead, linear_cross_entropy

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
