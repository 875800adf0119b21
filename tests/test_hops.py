"""How far a reader has to go from a public function to its arithmetic: no farther than today."""

import pytest
from hops import calls, entered

import duet_kernels as dk

# (files, functions) of the forward pass on a CPU.
MOST = {
    "linear_topk": (11, 38),
    "linear_gather": (9, 30),
    "linear_logsumexp": (11, 45),
    "topk_distill_loss": (11, 43),
    "topk_distill_loss tail": (14, 66),
    "topk_distill_stats": (15, 62),
    "linear_distill_loss": (12, 66),
    "linear_cross_entropy": (13, 57),
    "linear_token_stats": (11, 37),
}


@pytest.mark.parametrize("name", MOST)
def test_a_public_function_enters_no_more_files_and_functions(name):
    found = entered(calls()[name])
    files, functions = MOST[name]
    assert len({file for file, _ in found}) <= files and len(found) <= functions, found


def test_every_public_function_is_counted():
    assert set(MOST) == set(calls())
    public = {name for name in dk.__all__ if getattr(dk, name).__module__ == "duet_kernels.functional"}
    assert public and public == {name.split()[0] for name in MOST}
