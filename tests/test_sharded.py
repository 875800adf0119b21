"""Heads whose rows lie on several processes: the results, gradients and errors of one process (gloo, CPU)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks_at_work
import torch
import torch.distributed as dist
from tiny_models import tiny

from duet.model.lm import check_head
from duet_kernels import LMHead, linear_cross_entropy

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)

HERE = Path(__file__).parent
RANKS = {"two": 2, "four": 4}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """part -> name -> what each rank says of a check; the processes of a part are started once."""
    found = {}

    def of(part):
        if part not in found:
            found[part] = _run(part, tmp_path_factory.mktemp(part))
        return found[part]

    return of


def _run(part, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    arguments = [sys.executable, str(HERE / "ranks_at_work.py")]
    processes = [
        subprocess.Popen([*arguments, str(rank), str(RANKS[part]), str(folder), part], env=env)
        for rank in range(RANKS[part])
    ]
    end = time.monotonic() + 300
    for process in processes:
        try:
            process.wait(timeout=max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    files = [folder / f"{part}-{rank}.json" for rank in range(RANKS[part])]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.parametrize(
    "part, name", [(part, name) for part, checks in ranks_at_work.CHECKED.items() for name in checks]
)
def test_ranks(results, part, name):
    for rank, said in enumerate(results(part)):
        assert name in said, f"rank {rank} did not come so far: {_first_failure(results(part))}"
        assert said[name][0] == "", f"rank {rank}: {said[name][0]}"


def _first_failure(ranks):
    return next((failure for said in ranks for failure, _ in said.values() if failure), "no rank says why")


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
