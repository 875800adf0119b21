"""Which implementation runs, and how many bytes it may use, on devices that this machine need not have."""

import types

import pytest
import torch

from duet_kernels import dispatch, resolve_impl, set_workspace_bytes
from duet_kernels.dispatch import workspace_bytes

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a capability and so many bytes of memory, as torch describes it; ROCm's if `hip`."""

    def install(arch=90, memory=141 << 30, hip=None, triton=True):
        properties = types.SimpleNamespace(major=arch // 10, minor=arch % 10, total_memory=memory)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: arch > 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", triton)
        dispatch._total_memory.cache_clear()

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield install
    dispatch._total_memory.cache_clear()


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_kernel_is_taken_from_sm_80_on(gpu, op, arch):
    gpu(arch)
    for dtype in dispatch.DTYPES:
        for tokens in (None, 1, 64, 8192):
            choice, reason = resolve_impl(op, "cuda", dtype, tokens=tokens, k=64)
            assert choice == "triton" and f"sm_{arch}" in reason
    assert resolve_impl(op, "cuda", impl="triton") == ("triton", "asked for")
    assert resolve_impl(op, "cuda", impl="chunked") == ("chunked", "asked for")


@pytest.mark.parametrize(
    "machine, reason",
    [
        ({"arch": 75}, "Triton needs sm_80 or newer, this GPU is sm_75"),
        ({"triton": False}, "triton is not installed"),
        ({"arch": 0}, "this torch sees no CUDA device"),
    ],
)
def test_where_no_kernel_can_run(gpu, machine, reason):
    """`auto` runs chunked and says why; an explicit choice is refused with the same sentence."""
    gpu(**machine)
    for op in dispatch.OPS:
        assert resolve_impl(op, "cuda") == ("chunked", reason)
        with pytest.raises(RuntimeError, match=reason):
            resolve_impl(op, "cuda", impl="triton")


def test_rocm_runs_chunked_unless_asked(gpu):
    """Nobody ran the kernels there: `auto` does not, an explicit choice may try."""
    gpu(hip="7.2")
    choice, reason = resolve_impl("linear_topk", "cuda")
    assert choice == "chunked" and "ROCm" in reason and "impl='triton'" in reason
    assert resolve_impl("linear_topk", "cuda", impl="triton") == ("triton", "asked for")
    assert dispatch.architecture(CUDA) == 0
    assert not any(dispatch.half_products(CUDA, dtype) for dtype in dispatch.HALVES)


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_other_devices(gpu, device):
    gpu()
    choice, reason = resolve_impl("linear_topk", device)
    assert choice == "chunked" and device in reason
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        resolve_impl("linear_topk", device, impl="triton")
    assert not dispatch.half_products(torch.device(device), torch.bfloat16)
    assert workspace_bytes(torch.device(device)) == 256 << 20


def test_the_interpreter_is_taken_by_name_only(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu(75)
    assert resolve_impl("linear_topk", "cpu", impl="triton")[0] == "triton"
    assert resolve_impl("linear_topk", "cpu")[0] == resolve_impl("linear_topk", "cuda")[0] == "chunked"


def test_which_halves_the_library_multiplies(gpu):
    for arch, wanted in ((75, {torch.float16}), (80, set(dispatch.HALVES)), (90, set(dispatch.HALVES))):
        gpu(arch)
        assert {dtype for dtype in dispatch.DTYPES if dispatch.half_products(CUDA, dtype)} == wanted
    assert not dispatch.half_products(CPU, torch.bfloat16)


@pytest.mark.parametrize(
    "memory, wanted",
    [
        (8 << 30, 256 << 20),
        (24 << 30, 768 << 20),
        (40 << 30, 1280 << 20),
        (79 << 30, 2304 << 20),
        (288 << 30, 2304 << 20),
    ],
)
def test_the_workspace_follows_the_device(gpu, memory, wanted):
    """A 32nd of a GPU's memory from 256 MiB to 2.25 GiB; 256 MiB elsewhere; a setting holds everywhere."""
    gpu(memory=memory)
    assert workspace_bytes(CUDA) == dispatch.share_of(memory) == wanted
    assert workspace_bytes(CPU) == workspace_bytes() == 256 << 20
    assert set_workspace_bytes(5 << 20) is None
    try:
        assert workspace_bytes(CUDA) == workspace_bytes(CPU) == workspace_bytes() == 5 << 20
        assert set_workspace_bytes(6 << 20) == 5 << 20
    finally:
        assert set_workspace_bytes(None) == 6 << 20
    assert workspace_bytes(CUDA) == wanted


def test_what_a_command_prints(gpu, monkeypatch):
    gpu(90, 80 << 30)
    rows, size = dispatch.described("cuda")
    assert [row[:2] for row in rows] == [(op, "triton") for op in dispatch.OPS] and size == 2304 << 20
    slower = dispatch.measured.Slower("linear_topk", 90, 2, (1, 64), (0, 0), 2.0, 1.0, "N 64", "X", "abc")
    monkeypatch.setattr(dispatch.measured, "MEASURED", dispatch.measured.Measured((slower,)))
    rows, _ = dispatch.described("cuda")
    assert rows[0][:2] == ("linear_topk", "triton")
    assert rows[1] == ("linear_topk, 64 tokens", "chunked", slower.reason)
    rows, size = dispatch.described("cpu")
    assert {row[1] for row in rows} == {"chunked"} and size == 256 << 20
