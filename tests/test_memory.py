"""Neither pass of any chunked operation holds a logits-sized tensor, and the workspace setting is obeyed.

Two instruments, each shown to bite: a dispatch mode that sees the size of every tensor (also inside the custom ops),
and the allocator's own record of bytes.
"""

import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from duet_kernels import (
    LMHead,
    TopK,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    portable,
    set_workspace_bytes,
    topk_distill_loss,
    topk_distill_stats,
)
from duet_kernels.options import DIVERGENCES, Divergence
from duet_kernels.portable import cuts, gather, logsumexp
from duet_kernels.portable.dense_rows import RunningKL

V, D = 16384, 4  # the weight itself, V D, stays below N V / 4


class Sizes(TorchDispatchMode):
    """The largest number of elements among all tensors that operations return, the operation, and all shapes."""

    def __init__(self):
        super().__init__()
        self.largest, self.by, self.seen, self.shapes = 0, None, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.add(str(func))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.shapes.add(tuple(x.shape))
                if x.numel() > self.largest:
                    self.largest, self.by = x.numel(), str(func)
        return out


@contextlib.contextmanager
def watching():
    """A `Sizes` that is on inside the bodies of custom ops too (a mode is switched off where an op's body runs)."""
    mode = Sizes()

    def watched(function):
        def run(*args, **kwargs):
            with mode:
                return function(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in portable.__all__:
            patch.setattr(portable, name, watched(getattr(portable, name)))
        with mode:
            yield mode


def _case(n, dtype=torch.float32, v=V, d=D):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (1.5 * torch.randn(v, d, generator=generator)).to(dtype).requires_grad_()
    teacher = (hidden + 0.3 * torch.randn(n, d, generator=generator)).detach().to(dtype)
    return hidden, weight, teacher


def _dense(divergence, reduction):
    def run(hidden, weight, teacher):
        return linear_distill_loss(
            hidden, weight, teacher, weight, divergence=divergence, reduction=reduction, impl="chunked"
        )

    return run


def _sparse(divergence, normalization=None, k=32, support="teacher"):
    def run(hidden, weight, teacher):
        return linear_distill_loss(
            hidden,
            weight,
            teacher,
            weight,
            k=k,
            support=support,
            divergence=divergence,
            normalization=normalization,
            impl="chunked",
        )

    return run


def _masked(hidden, weight, teacher):
    mask = torch.arange(hidden.shape[0]) % 3 == 0
    top = linear_topk(teacher, weight, 16)
    return topk_distill_loss(hidden, weight, top, mask=mask) + linear_distill_loss(
        hidden, weight, teacher, weight, mask=mask
    )


def _capped(hidden, weight, teacher):
    bias = weight[:, 0].clone()
    head = LMHead(weight, bias, softcap=20.0, scale=1.1)
    labels = torch.arange(hidden.shape[0])
    return linear_cross_entropy(hidden, head, labels) + linear_distill_loss(hidden, head, teacher, head)


def _stats(hidden, weight, teacher):
    linear_token_stats(hidden, weight, torch.arange(hidden.shape[0]))
    return hidden.sum() + weight.sum()


def _topk_stats(hidden, weight, teacher):
    token_ids, options = torch.arange(len(hidden)), {"entropy": True, "student_mass": True, "overlap": True}
    options |= {"divergence": "reverse_kl", "normalization": "generalized", "impl": "chunked"}
    top = linear_topk(teacher, weight, 32)
    stats = topk_distill_stats(hidden, weight, top, token_ids=token_ids, **options)
    return (stats.loss + stats.logprob).mean()


OPERATIONS = {
    "topk-stats": _topk_stats,
    "topk": lambda h, w, t: linear_topk(t, w, 64).values.sum() + h.sum() + w.sum(),
    "topk-1000": lambda h, w, t: linear_topk(t, w, 1000).values.sum() + h.sum() + w.sum(),
    "gather": lambda h, w, t: linear_gather(h, w, torch.arange(64).expand(len(h), 64)).sum(),
    "logsumexp": lambda h, w, t: linear_logsumexp(h, w).sum(),
    "complement": lambda h, w, t: linear_logsumexp(h, w, exclude=torch.arange(64).expand(len(h), 64)).sum(),
    "cross-entropy": lambda h, w, t: linear_cross_entropy(h, w, torch.arange(len(h))),
    "cross-entropy-none": lambda h, w, t: linear_cross_entropy(
        h, w, torch.arange(len(h)), reduction="none"
    ).sum(),
    "token-stats": _stats,
    "huber": _sparse("huber"),
    "forward_kl": _sparse("forward_kl", "renormalize"),
    "tail": _sparse("forward_kl", "tail"),
    "jsd-tail": _sparse("jsd", "tail", support="union"),
    "student": _sparse("reverse_kl", "tail", support="student"),
    "zeroed": _sparse("forward_kl", "zeroed"),
    "truncated": _sparse("forward_kl", "truncated"),
    "generalized": _sparse("reverse_kl", "generalized"),
    **{f"dense-{name}": _dense(name, "mean") for name in DIVERGENCES},
    "dense-none": lambda h, w, t: _dense("forward_kl", "none")(h, w, t).sum(),
    "masked": _masked,
    "softcap-bias": _capped,
}


def _largest(run, n, dtype=torch.float32, frozen=False):
    hidden, weight, teacher = _case(n, dtype)
    weight.requires_grad_(not frozen)
    with watching() as mode:
        run(hidden, weight, teacher).backward()
    assert hidden.grad is not None and (weight.grad is not None) != frozen
    return mode


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_as_large_as_the_logits(name):
    mode = _largest(OPERATIONS[name], 256)
    assert mode.largest < 256 * V // 4, f"{mode.by} made {mode.largest} elements of {256 * V}"


@pytest.mark.parametrize(
    "name, dtype, frozen",
    [
        (name, dtype, (i + j) % 2 == 1)  # every pair of the three
        for i, name in enumerate(("huber", "tail", "dense-forward_kl", "topk"))
        for j, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
    ids=str,
)
def test_nor_with_more_tokens(name, dtype, frozen):
    mode = _largest(OPERATIONS[name], 512, dtype, frozen)
    assert mode.largest < 512 * V // 4, f"{mode.by} made {mode.largest} elements"


def test_the_detector_sees_inside_custom_ops():
    """The products of the forward and backward bodies are seen, not only the ops that hold them."""
    mode = _largest(OPERATIONS["tail"], 64)
    assert {"aten.mm.out", "aten.mm.default"} <= mode.seen
    assert any("scatter_add" in name for name in mode.seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_students_own_ids_need_nothing_of_vocabulary_size(frozen, dtype):
    """Ids of the rollout, log-probabilities of a server: no tensor has V elements, but dW and its rows' numbers."""
    n, k = 16, 8
    hidden, weight, _ = _case(n, dtype)
    weight.requires_grad_(not frozen)
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:k] for i in range(n)])
    with watching() as mode:
        teacher = TopK.from_logprobs(ids, torch.full((n, k), 1 / V).log())
        topk_distill_loss(hidden, LMHead(weight), teacher, divergence="reverse_kl").backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    allowed = set() if frozen else {(V, D), (V,)}
    assert {shape for shape in mode.shapes if max(shape, default=0) >= V or math.prod(shape) >= V} == allowed
    with watching() as mode:  # the instrument sees the pass that another normalization needs
        topk_distill_loss(
            hidden, LMHead(weight), teacher, divergence="reverse_kl", normalization="tail"
        ).backward()
    assert any(math.prod(shape) >= V for shape in mode.shapes - {(V, D), (V,)})


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_detector_bites(where, monkeypatch):
    """Logits inside a custom op's body, in one pass or the other, are found."""
    name = "topk_loss" if where == "forward" else "linear_gather_backward"
    good = getattr(portable, name)

    def wasteful(*args):
        hidden, head = args[:2]
        (hidden @ head.weight.T).logsumexp(-1)
        return good(*args)

    monkeypatch.setattr(portable, name, wasteful)
    mode = _largest(OPERATIONS["huber"], 64)
    assert mode.largest >= 64 * V


def test_the_definition_does_hold_logits():
    mode = _largest(lambda h, w, t: linear_distill_loss(h, w, t, w, impl="reference"), 64)
    assert mode.largest >= 64 * V


# --- bytes -----------------------------------------------------------------------------------------------------


def _peak_bytes(function):
    """High-water mark of the allocator while `function` runs, above what was allocated before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = function()
    steps = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    del kept
    now = peak = 0
    for _, size in sorted(steps, key=lambda step: step[0]):
        now += size
        peak = max(peak, now)
    return peak


def test_the_byte_counter_counts():
    assert _peak_bytes(lambda: torch.zeros(2**20)) == 4 * 2**20

    def both():
        x = torch.zeros(2**20)
        y = x + 1
        del x
        return y.sum() + torch.zeros(2**19).sum()

    assert 8 * 2**20 <= _peak_bytes(both) < 8 * 2**20 + 4096


N_BYTES, V_BYTES, WORKSPACE = 64, 16384, 2**20
V_WIDE = 65536


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("masked", "topk-1000")])
def test_bytes_beyond_the_results_stay_in_the_workspace(name):
    """Forward and backward, above inputs and gradients; the logits alone would be 4 MiB."""
    hidden, weight, teacher = _case(N_BYTES, v=V_BYTES)
    previous = set_workspace_bytes(WORKSPACE)
    try:
        OPERATIONS[name](*_case(8, v=512)).backward()  # lazy initialisations
        peak = _peak_bytes(lambda: OPERATIONS[name](hidden, weight, teacher).backward())
    finally:
        set_workspace_bytes(previous)
    # dW and db while they are made, scaled, and added to another; small [N, K] results and ids.
    results = 3 * (weight.numel() + V_BYTES) * 4 + 64 * N_BYTES * 64
    assert peak <= WORKSPACE + results, f"{peak / 2**20:.1f} MiB beside {WORKSPACE / 2**20:.0f}"


@pytest.mark.parametrize(
    "divergence, dtype",
    [(name, (torch.float32, torch.bfloat16)[i % 2]) for i, name in enumerate(DIVERGENCES)],
    ids=str,
)
def test_bytes_of_a_dense_loss_with_a_frozen_head_stay_in_the_workspace(divergence, dtype):
    """KLs in vocabulary tiles, with two sums of rows of W; the logits of both models would be 8 MiB."""
    hidden, weight, teacher = _case(N_BYTES, dtype, v=V_BYTES, d=64)
    weight.requires_grad_(False)
    step = _dense(divergence, "mean")
    small, few, *other = _case(8, dtype, v=512, d=64)
    previous = set_workspace_bytes(WORKSPACE)
    try:
        step(small, few.requires_grad_(False), *other).backward()  # lazy initialisations
        peak = _peak_bytes(lambda: step(hidden, weight, teacher).backward())
    finally:
        set_workspace_bytes(previous)
    assert peak <= WORKSPACE + 8 * N_BYTES * 64 * 4  # hidden states, their gradient, the two sums


N_WIDE, V_FEW, D_WIDE = 1024, 1024, 512  # hidden states of 2 MiB in fp32


@pytest.mark.parametrize("divergence", RunningKL.NAMES)
def test_a_strip_of_a_kl_holds_six_of_its_size(divergence):
    """Beside the logits of both: `strip_bytes` cuts a workspace, or a CPU's cache, by that."""
    rows, columns = 64, 4096
    s, t, weight = torch.randn(rows, columns), torch.randn(rows, columns), torch.randn(columns, 4)
    sums = RunningKL(torch.zeros(rows, 4), Divergence(divergence, "renormalize", 1.0, 0.5, 1.0))
    sums.add(s[:, :8], t[:, :8], weight[:8])  # lazy initialisations
    assert _peak_bytes(lambda: sums.add(s, t, weight)) <= 6.1 * s.nbytes


def test_excluded_ids_have_no_gradient_to_be_held():
    """For dW beside the workspace: where the ids are, and one tensor of zeros; gradients of their logits would be two more."""
    n, k = 256, 512
    hidden, weight, _ = _case(n, v=1024, d=8)
    ids = torch.arange(k).repeat(n, 1)

    def backward():
        tail = linear_logsumexp(hidden.detach(), LMHead(weight), exclude=ids)
        return _peak_bytes(lambda: tail.sum().backward())

    previous = set_workspace_bytes(2**20)
    try:
        backward()
        assert backward() <= 2**20 + 6 * n * k * 4
    finally:
        set_workspace_bytes(previous)


def _stats_of_all(h, w, top, mask):
    options = {"divergence": "forward_kl", "normalization": "tail", "token_ids": top.indices[:, 0]}
    return topk_distill_stats(h, w, top, mask=mask, **options, entropy=True, overlap=True)


WITHOUT_GRADIENT = {
    "topk": lambda h, w, top, mask: linear_topk(h, w, 8),
    "token-stats": lambda h, w, top, mask: linear_token_stats(h, w, top.indices[:, 0]),
    "complement": lambda h, w, top, mask: linear_logsumexp(h, w, exclude=top.indices),
    "cross-entropy": lambda h, w, top, mask: linear_cross_entropy(h, w, top.indices[:, 0]),
    "dense-kl": lambda h, w, top, mask: linear_distill_loss(h, w, h, w, mask=mask),
    "dense-mse": lambda h, w, top, mask: linear_distill_loss(h, w, h, w, divergence="mse", mask=mask),
    "tail": lambda h, w, top, mask: linear_distill_loss(h, w, h, w, k=8, normalization="tail", mask=mask),
    "topk-stats": _stats_of_all,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_hidden_states_are_neither_copied_nor_cast_whole(name, dtype):
    """Under no_grad, with a mask that leaves nothing out and no label that is ignored."""
    hidden, weight, _ = _case(N_WIDE, dtype, v=V_FEW, d=D_WIDE)
    ids = torch.arange(N_WIDE * 8).view(N_WIDE, 8) % V_FEW
    top, mask = TopK(torch.randn(N_WIDE, 8), ids, torch.randn(N_WIDE)), torch.ones(N_WIDE, dtype=torch.bool)
    previous = set_workspace_bytes(2**20)
    try:
        with torch.no_grad():
            peak = _peak_bytes(lambda: WITHOUT_GRADIENT[name](hidden, weight, top, mask))
    finally:
        set_workspace_bytes(previous)
    results = N_WIDE * 8 * 48  # values, ids, and what is made of them
    assert peak <= 2**20 + results < N_WIDE * D_WIDE * 4, f"{peak / 2**20:.1f} MiB"


@pytest.mark.parametrize("softcap, workspace", [(None, 16 * 2**20), (20.0, 56 * 2**20)])
def test_row_chunks_of_the_cross_entropy_stay_in_the_workspace(softcap, workspace, monkeypatch):
    """The chunks of logits, and what a softcap's slope adds to them; the logits alone would be 80 MiB."""
    hidden, weight, _ = _case(320, v=V_WIDE)
    labels = torch.arange(320)
    chunks = []
    by_rows = logsumexp._by_rows
    monkeypatch.setattr(logsumexp, "_by_rows", lambda *args: chunks.append(args[5]) or by_rows(*args))

    def step():
        linear_cross_entropy(hidden, LMHead(weight, softcap=softcap), labels).backward()
        hidden.grad = weight.grad = None

    previous = set_workspace_bytes(workspace)
    try:
        step()  # lazy initialisations
        peak = _peak_bytes(step)
    finally:
        set_workspace_bytes(previous)
    assert chunks and min(chunks) >= cuts.ENOUGH_ROWS
    assert peak <= workspace + 3 * weight.numel() * 4 + 320 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_many_ids_are_picked_from_stay_in_the_workspace(dtype, monkeypatch):
    hidden, weight, _ = _case(320, dtype, v=V_WIDE, d=64)
    ids = torch.randint(0, V_WIDE, (320, V_WIDE // 10 + 1), generator=torch.Generator().manual_seed(0))
    picked = []
    by_logits = gather.gather_from_logits
    monkeypatch.setattr(gather, "gather_from_logits", lambda *args: picked.append(args) or by_logits(*args))
    previous = set_workspace_bytes(16 * 2**20)
    try:
        with torch.no_grad():
            peak = _peak_bytes(lambda: linear_gather(hidden, weight, ids))
    finally:
        set_workspace_bytes(previous)
    assert picked
    results = ids.numel() * (4 + 8 + 2)  # values, ids in range, and which of them are not
    assert peak <= 16 * 2**20 + results


@pytest.mark.parametrize("k", [8, 64, 200])
def test_selection_counts_its_keys_and_ids(k):
    """A tile that is sorted whole needs ten times its own bytes: int64 keys, ids, their copies."""
    hidden, weight, _ = _case(256, v=V_WIDE)
    previous = set_workspace_bytes(4 * 2**20)
    try:
        peak = _peak_bytes(lambda: linear_topk(hidden, weight, k))
    finally:
        set_workspace_bytes(previous)
    candidates = 256 * k * 64  # the result, and the best so far in the company of a tile's
    assert peak <= 4 * 2**20 + candidates


def test_the_gather_needs_no_vocabulary_at_all():
    """A sparse step with a frozen head: a few MiB of gathered rows, whatever N and V are."""
    hidden, weight, _ = _case(2048, v=4096, d=256)
    weight.requires_grad_(False)
    ids = torch.randint(0, 4096, (2048, 32), generator=torch.Generator().manual_seed(0))
    top = TopK(torch.randn(2048, 32), ids, torch.zeros(2048))
    peak = _peak_bytes(lambda: topk_distill_loss(hidden, weight, top).backward())
    gathered, kept = gather._GATHER_BYTES, 2048 * (32 * 8 * 6 + 256 * 4 * 2)
    assert peak <= 3 * gathered + kept < 2048 * 32 * 256 * 4
