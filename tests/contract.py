"""What the tests of the contract share: heads, operations by name, which of them have a kernel, the losses of a top-k."""

import pytest
import torch
from divergences import FORMS

from duet_kernels import dispatch, resolve_impl
from duet_kernels.options import RAW
from duet_kernels.testing import DISTRIBUTIONS, OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FULL = {"bias": True, "softcap": 20.0, "scale": 1.3, "pad": 5}
HEADS = {"plain": {}, "full": FULL}
BY_NAME = {op.name: op for op in OPS}


def _runs(op, impl):
    try:
        return resolve_impl(op.resolve, "cpu", torch.float32, impl)[0] == impl
    except RuntimeError:
        return False


NEEDS_TRITON = pytest.mark.skipif(not dispatch._TRITON_INSTALLED, reason="triton is not installed")
ON_TRITON = [op for op in OPS if _runs(op, "triton")]
# The interpreter takes a tenth of a second a kernel: the parts of the contract that are the same code for
# every divergence run on one raw one, one distribution and the gather.
SAMPLED = [
    op
    for op in ON_TRITON
    if op.name in ("gather", "topk-huber", "topk-forward_kl-renormalize", "linear-jsd", "cross-entropy")
]
SPARSE_IMPLS = ["chunked", *(["triton"] if ON_TRITON else [])]
TOPK_OPTIONS = [
    *({"divergence": name} for name in RAW),
    *(
        {"divergence": name, "normalization": normalization, "temperature": 1.5}
        for name, normalization in FORMS
        if name in DISTRIBUTIONS
    ),
]
