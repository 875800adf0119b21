"""The fused top-k loss against the definition and autograd in fp64, and its programs waiting for each other."""

import math

import pytest
import torch
from forks import ended_by, forked
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from duet_kernels import LMHead, reference
from duet_kernels.dispatch import grad_dtype
from duet_kernels.head import Need
from duet_kernels.options import Divergence
from duet_kernels.triton import gather_loss as kernel
from duet_kernels.triton.gather_loss import topk_loss
from duet_kernels.triton.primitives import INTERPRETED
from duet_kernels.triton.tiles import LOSS_SLOTS, LossTile

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, D, K = 7, 61, 28, 6
SPECS = {name: Divergence(name, "none", 1.0, 0.5, 0.8) for name in ("huber", "mse", "l1")}
SPECS |= {
    name: Divergence(name, "renormalize", 1.7, 0.3, 0.8)
    for name in ("forward_kl", "reverse_kl", "jsd", "tvd")
}
ENDS = {"plain": (None, 1.0), "softcap": (20.0, 1.0), "softcap and scale": (2.5, 0.7)}
SPLIT = LossTile(8, 16, 8, 1, 96)  # two programs a token at D = 28, two pieces each
every_loss = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
two_losses = pytest.mark.parametrize("spec", [SPECS["huber"], SPECS["jsd"]], ids=["huber", "jsd"])
ONE = SPLIT._replace(columns=32)
every_tile = pytest.mark.parametrize(
    "tile", [None, ONE, SPLIT], ids=["one by one", "one program", "two programs"]
)
fused_tile = pytest.mark.parametrize("tile", [ONE, SPLIT], ids=["one program", "two programs"])

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem(dtype=torch.float64, *, n=N, v=V, d=D, k=K, gap=1.0, seed=0, end=(None, 1.0), bias=True):
    """(hidden, head, ids, teacher, factor) with absent slots, an id met twice and a row that counts nothing."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, b = (
        x.to(dtype).to(DEVICE) for x in (randn(n, d), randn(v, d) * 2 / math.sqrt(d), randn(v))
    )
    head = LMHead(weight, b if bias else None, *end)
    ids = torch.randint(0, v, (n, k), generator=generator).to(DEVICE)
    noise, factor = (gap * randn(n, k)).to(DEVICE), torch.rand(n, generator=generator).to(DEVICE) + 0.1
    wide = LMHead(weight.double(), b.double() if bias else None, *end)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    teacher = (reference.linear_gather(hidden.double(), wide, ids) + noise).to(acc)
    if n > 5 and k > 4:
        teacher[3, 2:4], ids[3, 2:4] = -math.inf, -1
        ids[5, 0] = ids[5, 1]
        factor[4] = 0
    return hidden, head, ids, teacher, factor.to(acc)


def expected(hidden, head, ids, teacher, factor, spec, acc=torch.float64):
    """(f L, dh) from the definition in `acc`, of rows that count."""
    leaf = hidden.detach().to(acc).requires_grad_()
    wide = LMHead(
        head.weight.to(acc), None if head.bias is None else head.bias.to(acc), head.softcap, head.scale
    )
    rows = reference.topk_loss(leaf, wide, ids, teacher.to(acc), None, spec)
    loss = torch.where(factor == 0, torch.zeros_like(rows), factor.to(acc) * rows)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def run(inputs, spec, **options):
    return topk_loss(*inputs, spec, options.pop("need", Need(True)), **options)


def relative_rms(got, wanted):
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()).item()


# --- values and gradients --------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize(
    ("end", "tile"), [("plain", ONE), ("softcap", SPLIT), ("softcap and scale", None)], ids=str
)
def test_fp64_equals_the_definition(spec, tile, end):
    inputs = problem(end=ENDS[end])
    loss, values, dvalues, dhidden = run(inputs, spec, tile=tile)
    wanted_loss, wanted = expected(*inputs, spec)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dhidden, wanted, rtol=1e-12, atol=1e-13)
    hidden, head, ids, teacher, factor = inputs
    z = reference.linear_gather(hidden, head, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    torch.testing.assert_close(values[factor != 0], z[factor != 0], rtol=1e-12, atol=1e-12)
    # The gradient in the logits, which the sparse dW is made of.
    leaf = z.masked_fill(ids < 0, 0).requires_grad_()
    rows = reference.divergence(leaf, teacher, None, None, spec)
    slope = torch.autograd.grad((factor * rows).sum(), leaf)[0]
    torch.testing.assert_close(dvalues, slope, rtol=1e-12, atol=1e-13)


@two_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_budget(spec, dtype):
    """Relative RMS error at most twice that of torch with fp32 logits from the same rounded inputs, + 4 eps."""
    inputs = problem(dtype, end=(20.0, 1.0), gap=0.3)
    loss, values, dvalues, dhidden = run(inputs, spec, tile=SPLIT)
    assert loss.dtype == values.dtype == dvalues.dtype == torch.float32 and dhidden.dtype == grad_dtype(dtype)
    truth, baseline = expected(*inputs, spec), expected(*inputs, spec, acc=torch.float32)
    for a, b, t in zip((loss, dhidden), baseline, truth, strict=True):
        budget = 2 * relative_rms(b.to(a.dtype), t) + 4 * torch.finfo(a.dtype).eps
        assert relative_rms(a, t) <= budget


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, run):
        loss, _, _, dhidden = run(hidden)
        ctx.save_for_backward(dhidden)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return grad[:, None] * ctx.saved_tensors[0], None


@two_losses
def test_gradcheck_of_the_kernel(spec):
    """Every loss is in `test_fp64_equals_the_definition`."""
    hidden, *rest = problem(n=4, v=9, d=20, k=5, end=(2.5, 0.7))

    def loss(hidden):
        return _Loss.apply(hidden, lambda h: run((h, *rest), spec, tile=SPLIT))

    assert torch.autograd.gradcheck(loss, hidden.requires_grad_(), fast_mode=True)


# --- shapes and layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "v", "d", "k"),
    [
        (1, 1, 1, 1),
        (3, 7, 16, 1),
        (2, 80, 30, 33),
        (2, 90, 18, 64),
        (2, 90, 18, 65),
        (3, 9, 2, 3),
        (2, 5, 1030, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_shapes(n, v, d, k, dtype):
    """K from 1 to the most that a program holds and one more; D below, at and above a tile's columns."""
    assert LOSS_SLOTS == 64
    inputs, spec = problem(dtype, n=n, v=v, d=d, k=k, bias=False), SPECS["jsd"]
    loss, _, _, dhidden = run(inputs, spec)
    wanted_loss, wanted = expected(*inputs, spec)
    close = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.002}
    torch.testing.assert_close(loss.double(), wanted_loss, **close)
    torch.testing.assert_close(dhidden.double(), wanted, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("odd", ["hidden", "weight", "width", "columns", "the rest"])
def test_any_strides(dtype, odd):
    """Words of two halves where rows allow them, single numbers where they do not."""
    hidden, head, ids, teacher, factor = problem(dtype, n=3, d=42)
    if odd == "width":
        hidden, head = hidden[:, :41], LMHead(head.weight[:, :41], head.bias)
    flat = [hidden.contiguous(), LMHead(head.weight.contiguous(), head.bias), ids, teacher, factor]
    packed = kernel._packs(flat[0], flat[1].weight)
    assert packed == (dtype == torch.bfloat16 and odd != "width")
    if odd == "hidden":
        hidden = torch.cat([hidden, hidden[:, :3]], 1)[:, :42]
    if odd == "weight":
        head = LMHead(torch.cat([head.weight, head.weight[:, :3]], 1)[:, :42], head.bias)
    if odd == "columns":
        hidden, head = hidden.T.contiguous().T, LMHead(head.weight.T.contiguous().T, head.bias)
    if odd == "the rest":
        ids, teacher = ids.T.contiguous().T, teacher.T.contiguous().T
        factor = torch.stack([factor, factor + 1], 1)[:, 0]
        head = LMHead(head.weight, torch.stack([head.bias, head.bias], 1)[:, 1])
    else:
        assert not kernel._packs(hidden, head.weight)
    wanted = run(flat, SPECS["jsd"], tile=SPLIT)
    for a, b in zip(run((hidden, head, ids, teacher, factor), SPECS["jsd"], tile=SPLIT), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6) if a.dtype == torch.float32 else (
            torch.testing.assert_close(a, b, rtol=0.01, atol=1e-5)
        )


@pytest.mark.parametrize("sizes", [{"n": 0}, {"k": 0}, {"d": 0}], ids=str)
def test_nothing_to_do(sizes):
    n, d, k = sizes.get("n", 3), sizes.get("d", 4), sizes.get("k", 2)
    head = LMHead(torch.ones(5, d, device=DEVICE))
    ids = torch.zeros(n, k, dtype=torch.int64, device=DEVICE)
    teacher, factor = torch.zeros(n, k, device=DEVICE), torch.ones(n, device=DEVICE)
    results = topk_loss(torch.ones(n, d, device=DEVICE), head, ids, teacher, factor, SPECS["mse"], Need(True))
    assert [tuple(x.shape) for x in results] == [(n,), (n, k), (n, k), (n, d)]
    assert all((x == 0).all() for x in results)


def test_offsets_beyond_32_bits(tmp_path):
    """Rows of every operand and of dh that begin more than 2^31 elements in; what is not touched is never mapped."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    far, columns = 2**30 + 64, 8

    def memory(name, dtype):
        size = 2 * far + 64
        if not INTERPRETED:
            return torch.zeros(size, dtype=dtype, device=DEVICE)
        return torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)

    def rows(name, dtype, width, values):
        made = memory(name, dtype).as_strided((3, width), (far, 1))
        made.copy_(values)
        return made

    hidden = rows("hidden", torch.float16, columns, torch.arange(24).view(3, 8) / 8)
    weight = rows("weight", torch.float16, columns, torch.arange(24).view(3, 8) / 4)
    ids = rows("ids", torch.int16, 2, torch.tensor([[2, 1], [1, 0], [0, 2]]))
    teacher = rows("teacher", torch.float16, 2, torch.zeros(3, 2))
    factor = memory("factor", torch.float16).as_strided((3,), (far,))
    factor.copy_(torch.tensor([1.0, 0.0, 2.0]))
    dhidden = memory("dhidden", torch.float16)
    loss, values, dvalues = torch.empty(3), torch.empty(3, 2), torch.empty(3, 2)
    spec, need = SPECS["mse"], Need(True)
    kernel._topk_loss_kernel[(3,)](
        hidden, weight, None, ids, teacher, factor,
        loss.to(DEVICE), None, loss.to(DEVICE), values.to(DEVICE), dvalues.to(DEVICE), dhidden,
        2, 3, far,
        *hidden.stride(), *weight.stride(), 0, *ids.stride(), *teacher.stride(), factor.stride(0),
        0.0, 1.0, 1.0, 0.5, 1.0,
        HAS_SOFTCAP=False, HIDDEN=need.hidden,
        DIVERGENCE=spec.name, NORMALIZATION=spec.normalization, EPS=1e-7, ACC=kernel.ACCUMULATORS[loss.dtype],
        FIRST=True, SECOND=True, PACKED=False, EVEN=False, SPLITS=1, PARTS=1, ROWS=2, WORDS=columns, PIECE=columns,
        num_warps=1,
    )  # fmt: skip
    for n, f in ((0, 1), (2, 2)):
        w = weight[ids[n].long()].double()
        wanted = f * 2 * ((w @ hidden[n].double())[:, None] * w).sum(0)
        got = dhidden.as_strided((columns,), (1,), n * far)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)
    assert (dhidden.as_strided((columns,), (1,), far) == 0).all()


# --- what must not leak ----------------------------------------------------------------------------------------


@two_losses
@every_tile
def test_a_row_without_a_factor_is_not_read(spec, tile):
    """Exactly 0, also where the hidden state, the teacher and the ids say nothing; one by one its logits are made."""
    inputs = problem(torch.bfloat16)
    inputs[-1][6] = 0
    clean = run(inputs, spec, tile=tile)
    for x in (inputs[0], inputs[3]):
        x[6] = math.nan
    inputs[2][6] = 2**40
    for name, a, b in zip(("f L", "z", "dz", "dh"), run(inputs, spec, tile=tile), clean, strict=True):
        assert (name == "z" and tile is None) or (torch.equal(a, b) and (a[[4, 6]] == 0).all())


@every_loss
@pytest.mark.parametrize("where", ["hidden", "teacher", "factor"])
def test_nan_stays_in_its_row(spec, where, tile=SPLIT):
    inputs = problem(torch.float32, n=3)
    clean = run(inputs, spec, tile=tile)
    inputs[{"hidden": 0, "teacher": 3, "factor": 4}[where]][1:2] = math.nan
    loss, _, dvalues, dhidden = results = run(inputs, spec, tile=tile)
    # A teacher of NaN is one slot of huber, mse or l1, and of every slot's probability in the others.
    slots = dvalues[1].isnan()
    assert (
        loss[1].isnan() and dhidden[1].isnan().all() and (slots.all() if where != "teacher" else slots.any())
    )
    others = torch.arange(3) != 1
    assert all(torch.equal(a[others], b[others]) for a, b in zip(results, clean, strict=True))


@every_tile
@pytest.mark.parametrize("past", [V, 2**40])
def test_ids_past_the_vocabulary_give_nan_in_their_row(tile, past):
    inputs = problem(torch.bfloat16)
    clean = run(inputs, SPECS["huber"], tile=tile)
    inputs[2][6, 1] = past
    loss, values, dvalues, dhidden = results = run(inputs, SPECS["huber"], tile=tile)
    assert loss[6].isnan() and dhidden[6].isnan().all()
    assert values[6].isnan().nonzero().tolist() == dvalues[6].isnan().nonzero().tolist() == [[1]]
    others = torch.arange(N) != 6
    assert all(torch.equal(a[others], b[others]) for a, b in zip(results, clean, strict=True))


@two_losses
@every_tile
def test_absent_slots(spec, tile):
    """A row without any slot gives 0; its id may be anything below 0."""
    inputs = problem()
    inputs[3][2], inputs[2][2] = -math.inf, -7
    results = run(inputs, spec, tile=tile)
    assert all((results[i][2] == 0).all() for i in (0, 2, 3)) and (results[1][2] == -math.inf).all()
    for a, b in zip((results[0], results[3]), expected(*inputs, spec), strict=True):
        keep = torch.arange(N) != 2
        torch.testing.assert_close(a[keep], b[keep], rtol=1e-12, atol=1e-13)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_student_equal_to_its_teacher_gives_zero(spec, dtype):
    """Logits from another kernel, in another order of additions: 0 within 8 eps of their scale."""
    hidden, head, ids, _, factor = problem(dtype, d=130)
    teacher = kernel.linear_gather(hidden, head, ids)
    loss, values, _, _ = run(
        (hidden, head, ids, teacher, factor), spec, tile=SPLIT._replace(columns=64, piece=32)
    )
    known = ids >= 0
    noise = 8 * torch.finfo(torch.float32).eps * teacher[known].abs().max()
    live = factor != 0
    assert (values - teacher)[known & live[:, None]].abs().max() <= noise
    limit = noise if spec.name in ("huber", "mse", "l1") else noise / spec.temperature
    assert loss.abs().max() <= K * limit * factor.max()


# --- order and cost --------------------------------------------------------------------------------------------


@every_tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal_and_inputs_stay(tile, dtype):
    inputs = problem(dtype)
    tensors = [inputs[0], inputs[1].weight, *inputs[2:]]
    before = [x.clone() for x in tensors]
    first, second = (run(inputs, SPECS["jsd"], tile=tile) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@every_tile
def test_values_do_not_depend_on_who_asks(tile):
    inputs = problem(torch.bfloat16)
    *values, _ = run(inputs, SPECS["jsd"], tile=tile)
    *alone, nothing = run(inputs, SPECS["jsd"], tile=tile, need=Need(False))
    assert nothing is None
    assert all(torch.equal(a, b) for a, b in zip(alone, values, strict=True))


class _Ops(TorchDispatchMode):
    def __init__(self):
        self.names = []
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


class _Recorded:
    """In the place of a kernel: only says how it would have been launched."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, options["FIRST"], options["SECOND"]))


def test_cost_on_the_host(monkeypatch):
    """Where a token has several programs: one launch, and six allocations of which one is filled."""
    monkeypatch.setattr(kernel, "_topk_loss_kernel", recorded := _Recorded())
    inputs = problem()
    with _Ops() as ops:
        run(inputs, SPECS["huber"], tile=SPLIT, phases=False)
    assert recorded.launches == [((2 * N,), True, True)]
    assert sum(name.startswith(("empty", "zeros", "new_")) for name in ops.names) == 6
    assert not set(ops.names) - {
        "empty.memory_format",
        "empty_like",
        "empty",
        "zeros",
        "zero_",
        "fill_",
        "slice",
    }


def test_partial_sums_keep_a_quarter_of_the_workspace(monkeypatch):
    """Fewer tokens a launch, and the same results."""
    inputs = problem()
    wanted = run(inputs, SPECS["huber"], tile=SPLIT, phases=True)
    each = 2 * SPLIT.rows * 8
    monkeypatch.setattr(kernel, "workspace_bytes", lambda device: 4 * 3 * each)
    for a, b in zip(run(inputs, SPECS["huber"], tile=SPLIT, phases=True), wanted, strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(kernel, "_topk_loss_kernel", recorded := _Recorded())
    run(inputs, SPECS["huber"], tile=SPLIT, phases=False)
    assert [launch[0] for launch in recorded.launches] == [(6,), (6,), (2,)]


def test_when_one_kernel_does_both(monkeypatch):
    """Raw logits and more than three quarters of the slots that it can hold, where dh is wanted."""
    taken = []
    monkeypatch.setattr(kernel, "_one_by_one", lambda *args: taken.append("one by one"))
    monkeypatch.setattr(kernel, "_topk_loss_kernel", _Recorded())
    for spec, k, need in (("huber", 49, True), ("huber", 48, True), ("jsd", 64, True), ("mse", 64, False)):
        before = len(taken)
        run(problem(k=k), SPECS[spec], need=Need(need))
        assert (len(taken) == before) == ((spec, k, need) == ("huber", 49, True))


class _SideBySide:
    """Runs every program of a grid in a process of its own, all at the same time, on shared memory.

    Each is a grid of one program: which one it is, it takes from the counter.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            shared = [x.clone().share_memory_() if isinstance(x, torch.Tensor) else x for x in args]
            children = [self.start(shared, options) for _ in range(grid[0])]
            assert [ended_by(child) for child in children] == [0] * grid[0]
            for x, own in zip(args, shared, strict=True):
                if isinstance(x, torch.Tensor):
                    x.copy_(own)

        return launch

    def start(self, args, options):
        def program():
            from triton.runtime import interpreter

            interpreter.GridExecutor._restore_args_dev = lambda *args: None  # the memory is shared
            self.kernel[(1,)](*args, **options)

        return forked(program, seconds=120)  # a program that waits for ever ends the test


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's programs in processes of their own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_programs_wait_for_each_other(dtype, monkeypatch):
    """All programs of a launch at the same time: what two launches give, bit by bit."""
    inputs = problem(dtype, n=3)
    wanted = run(inputs, SPECS["jsd"], tile=SPLIT, phases=True)
    monkeypatch.setattr(kernel, "_topk_loss_kernel", _SideBySide(kernel._topk_loss_kernel))
    for a, b in zip(run(inputs, SPECS["jsd"], tile=SPLIT, phases=False), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("arch, like", [(86, 80), (89, 80), (103, 100), (75, 0), (90, 0), (120, 0)])
def test_a_chip_takes_the_tile_of_its_generation(arch, like, monkeypatch):
    monkeypatch.setattr(kernel.tiles, "LOSS", {(a, 2): ONE._replace(registers=8 + a) for a in (0, 80, 100)})
    assert kernel.tiles.loss_tile(arch, 2, 8, 32 * ONE.columns).registers == 8 + like


@pytest.mark.parametrize(
    "rocm, tile, bounded", [(False, SPLIT, True), (False, ONE, False), (True, SPLIT, False)]
)
def test_registers_are_bounded_where_programs_wait_and_never_on_rocm(rocm, tile, bounded, monkeypatch):
    """Triton's compiler for AMD raises a KeyError at `maxnreg`, None too."""
    launches = []

    class Launch:
        def __class_getitem__(cls, grid):
            return lambda *args, **options: launches.append(options)

    monkeypatch.setattr(kernel, "_topk_loss_kernel", Launch)
    monkeypatch.setattr(torch.version, "hip", "7.0" if rocm else None)
    topk_loss(*problem(), SPECS["huber"], Need(True), tile=tile, phases=False)
    assert [options.get("maxnreg") for options in launches] == [tile.registers if bounded else None]
    assert ("maxnreg" in launches[0]) == bounded


@pytest.mark.skipif(INTERPRETED, reason="programs that wait for each other need a GPU")
@every_loss
def test_programs_wait_for_each_other_on_a_gpu(spec):
    inputs = problem(torch.bfloat16, n=3000, d=1100, v=500, k=50)
    tile = kernel.tiles.loss_tile(kernel.tiles.architecture(inputs[0].device), 2, 50, 1100)
    wanted = run(inputs, spec, tile=tile, phases=True)
    for _ in range(3):
        for a, b in zip(run(inputs, spec, tile=tile, phases=False), wanted, strict=True):
            assert torch.equal(a, b)
