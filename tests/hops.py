"""How many files and functions of `duet_kernels` the forward pass of each public function enters on a CPU.

python tests/hops.py            a table
python tests/hops.py NAME       the functions of one, in the order in which they are entered

A function counts once however often it is called; comprehensions, lambdas and property getters of the standard library
do not count. `tests/test_hops.py` holds the limits.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch

import duet_kernels as dk

PACKAGE = pathlib.Path(dk.__file__).parent


def calls() -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, generator=generator), torch.randn(9, 4, generator=generator)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    top = dk.linear_topk(hidden, weight, 2)
    leaf = hidden.clone().requires_grad_()
    return {
        "linear_topk": lambda: dk.linear_topk(hidden, weight, 2),
        "linear_gather": lambda: dk.linear_gather(leaf, weight, ids),
        "linear_logsumexp": lambda: dk.linear_logsumexp(leaf, weight, exclude=ids),
        "topk_distill_loss": lambda: dk.topk_distill_loss(leaf, weight, top),
        "topk_distill_loss tail": lambda: dk.topk_distill_loss(
            leaf, weight, top, divergence="forward_kl", normalization="tail"
        ),
        "topk_distill_stats": lambda: dk.topk_distill_stats(
            leaf, weight, top, token_ids=ids[:, 0], entropy=True
        ),
        "linear_distill_loss": lambda: dk.linear_distill_loss(leaf, weight, hidden, weight),
        "linear_cross_entropy": lambda: dk.linear_cross_entropy(leaf, weight, ids[:, 0]),
        "linear_token_stats": lambda: dk.linear_token_stats(hidden, weight, ids[:, 0]),
    }


def entered(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """(file, qualified name) of every function of the package that `call` enters, once each."""
    found: dict[tuple[str, str], None] = {}

    def look(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        name = code.co_qualname
        if "<" not in name.rsplit(".", 1)[-1]:  # a comprehension, a generator expression or a lambda
            found[str(pathlib.Path(code.co_filename).relative_to(PACKAGE)), name] = None

    call()  # what happens once only, such as an import, does not count
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(found)


def main() -> None:
    for name, call in calls().items():
        found = entered(call)
        if len(sys.argv) == 1:
            print(f"{name:24} {len({file for file, _ in found}):3} files {len(found):4} functions")
        elif name == sys.argv[1]:
            print("\n".join(f"{file:32} {function}" for file, function in found))


if __name__ == "__main__":
    main()
