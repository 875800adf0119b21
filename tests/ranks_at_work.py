"""Processes that run the checks of `test_sharded.py`: each finds its rank in the environment and writes down what failed.

python ranks_at_work.py RANK WORLD FOLDER PART      one rank; the ranks meet through a file in FOLDER
"""

import dataclasses
import datetime
import json
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import duet_kernels as dk
from duet_kernels import LMHead, ranks
from duet_kernels.testing import CHECKS, OPS, assert_within_budget, judge, make_problem
from duet_kernels.testing.problems import Problem

FULL = {"bias": True, "softcap": 20.0, "scale": 1.3, "pad": 5}


def cut(x, counts, rank=None):
    rank = dist.get_rank() if rank is None else rank
    return None if x is None else x[sum(counts[:rank]) : sum(counts[: rank + 1])]


@dataclasses.dataclass(frozen=True, eq=False)
class Sharded(Problem):
    """A problem whose leaves are whole, and whose heads are this rank's rows; gradients of the leaves add up over the ranks."""

    counts: tuple[int, ...] = ()
    shard_teacher: bool = True

    @property
    def head(self):
        world = dist.group.WORLD
        weight = ranks.replicated(self.weight, world)
        bias = None if self.bias is None else ranks.replicated(self.bias, world)
        options = self.softcap, self.scale, self.vocab_size, world, self.counts
        return LMHead(cut(weight, self.counts), cut(bias, self.counts), *options)

    @property
    def teacher_head(self):
        whole = Problem.teacher_head.fget(self)
        if not self.shard_teacher:
            return whole
        rows = {name: cut(getattr(whole, name), self.counts) for name in ("weight", "bias")}
        return dataclasses.replace(whole, **rows, group=dist.group.WORLD, shards=self.counts)

    def teacher_topk(self, k=8, temperature=1.0):
        return plain(self).teacher_topk(k, temperature)


def plain(problem):
    return Problem(**{f.name: getattr(problem, f.name) for f in dataclasses.fields(Problem)})


def over_ranks(op, counts, shard_teacher=True):
    """The operation on shards, with the operation in one process as its definition."""

    def call(problem, **options):
        fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(Problem)}
        return op.call(Sharded(**fields, counts=counts, shard_teacher=shard_teacher), **options)

    def define(problem, **options):
        return op.call(problem, impl="reference", **options)

    return dataclasses.replace(op, call=call, definition=define)


def contract(ops, dtype=torch.float32, checks=CHECKS, counts=(130, 78), shard_teacher=True, **shape):
    problem = make_problem(**({"lead": 11, "v": 203, "d": 24, "dtype": dtype} | FULL | shape))
    for op in ops:
        for check in checks:
            check(over_ranks(op, counts, shard_teacher), problem, "chunked")


class Sent(TorchDispatchMode):
    """The bytes that this rank gives to collective operations."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name
            given = args[1] if "gather" in name else args[0]  # allgather_(outputs, inputs, ...)
            self.bytes += sum(
                x.nbytes for x in torch.utils._pytree.tree_leaves(given) if isinstance(x, torch.Tensor)
            )
            self.calls += 1
        return func(*args, **(kwargs or {}))


CHECKED = {}


def check(part):
    def keep(function):
        CHECKED.setdefault(part, {})[function.__name__] = function
        return function

    return keep


def add_contracts():
    for op in OPS:
        CHECKED["two"][f"contract of {op}"] = lambda op=op: contract([op])


CHECKED["two"] = {}
add_contracts()


def main():
    rank, world, folder, part = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    store = f"file://{folder / part}"
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=store, timeout=timeout)
    results = {}
    for name, function in CHECKED[part].items():
        began = time.time()
        try:
            function()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        print(rank, name, round(time.time() - began, 2), results[name][-1500:], flush=True)
        if results[name]:
            break  # the other ranks may be in another place
    (folder / f"{part}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
