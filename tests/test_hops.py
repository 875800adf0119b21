"""How far a reader has to go from a public function to its arithmetic: no farther than today."""

import pytest
from hops import calls, entered

import duet_kernels as dk

# (files, functions) of the forward pass on a CPU.
MOST = {
    "linear_topk": (11, 41),
    "linear_gather": (9, 34),
    "linear_logsumexp": (12, 51),
    "topk_distill_loss": (11, 47),
    "topk_distill_loss tail": (14, 70),
    "topk_distill_stats": (15, 68),
    "linear_distill_loss": (12, 70),
    "linear_cross_entropy": (13, 62),
    "linear_token_stats": (11, 40),
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
