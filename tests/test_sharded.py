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
