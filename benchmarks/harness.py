"""Time and memory of callables, and the row of JSON that keeps them. Knows nothing of what it measures.

Time: variants run in turn, A B C A B C ..., so that a drifting machine slows all alike; median with p20 and p80. Each
variant may bring several input sets, used in turn, so that no call finds its inputs in a cache that the call before
filled. On a GPU by events, behind a pause in which the host gets ahead of the device, after a warm-up that lets the
clocks settle. Memory: the highest point during one call minus what lived before it, so inputs do not count and
outputs do (CUDA: the allocator's peak; Linux: the resident size, whose high-water mark is reset before the call).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
MIN_ROUNDS, MAX_ROUNDS = 3, 50
READS_WEIGHT_ONCE = 64  # tokens
SHORT_MS = 5.0  # shorter calls are timed with their launches, too
WARM_SECONDS = 0.3  # of a GPU's work before the first timed call: clocks rise from idle in about that time


@dataclasses.dataclass
class Row:
    """One measurement. `ms` and `peak_mb` are None when the correctness gate was red or the provider did not run."""

    commit: str
    device: str
    torch: str
    triton: str
    gate: str  # "green", "red", or "not run" where the provider is absent
    op: str
    provider: str
    impl: str
    n: int
    d: int
    v: int
    k: int
    dtype: str
    # "pass" is a Python keyword; it is renamed in the JSON
    which_pass: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    peak_mb: float | None = None
    floor_ms: float | None = None
    copy_gb_s: float | None = None
    divergence: str = ""
    head: str = "frozen"  # or "trainable"; "none" for an operation without a gradient
    status: str = "ok"  # or "out of memory", "absent: why", "error: why", "wrong: what"
    provider_version: str = ""
    error: float | None = (
        None  # largest relative RMS error of value and gradients against fp64, from the gate
    )
    rounds: int = 0
    workspace_mb: float | None = None
    ids: str = "likeliest"  # which ids the teacher's slots hold: its likeliest, or "zipf"
    wall_ms: float | None = None  # of a short call, with Python and launches, begun on an idle device
    driver: str = ""
    clocks: str = ""

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        fields["pass"] = fields.pop("which_pass")
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str) -> Row:
        fields = json.loads(line)
        fields["which_pass"] = fields.pop("pass")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in known})


def read_rows(path: pathlib.Path | str) -> list[Row]:
    return [Row.from_json(line) for line in pathlib.Path(path).read_text().splitlines() if line.strip()]


# --- where it was measured --------------------------------------------------------------------------------------


def environment(device: torch.device | str | None = None) -> dict[str, str]:
    """The fields of a row that say where it was measured; without `device`, on a GPU where there is one."""
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    fields = {
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }
    if on_gpu:
        driver, *clocks = _driver_and_clocks()
        fields |= {"driver": driver, "clocks": ", ".join(clocks)}
    return fields


def clocks_in_words(*clocks: str) -> str:
    """What the numbers of `clocks` are, in the order of the query; of several runs each different number."""
    told = [each.split(", ") for each in clocks]
    if any(len(each) != 3 for each in told):
        return f"clocks {'; '.join(dict.fromkeys(clocks))}"
    sm, memory, most = (" or ".join(dict.fromkeys(of)) for of in zip(*told, strict=True))
    return f"clocks when a run began: SM {sm} (at most {most}), memory {memory}"


@functools.cache
def _driver_and_clocks() -> Sequence[str]:
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm"
    told = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]).splitlines()
    return told[0].split(", ") if told else ("unknown", "unknown")


def _cpu_name() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), model)
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def _commit() -> str:
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    changed = _output([*git, "status", "--porcelain", "--", "../duet_kernels"])
    return (_output([*git, "rev-parse", "--short", "HEAD"]) or "unknown") + ("+changes" if changed else "")


def _output(command: list[str]) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def answers(device: torch.device | str) -> bool:
    """Whether the device still computes: after an illegal access every later call of a process fails."""
    gc.collect()  # what a failed call left
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        return torch.ones(8, device=device).sum().item() == 8
    except Exception:
        return False


# --- measuring --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """What one variant took: milliseconds of every timed call, MiB of one call, and whether it ran at all."""

    ms: list[float] = dataclasses.field(default_factory=list)
    peak_mb: float | None = None
    status: str = "ok"
    wall_ms: float | None = None

    def fields(self) -> dict[str, object]:
        """The fields of a row."""
        if self.status != "ok":
            return {"status": self.status}
        p20, median, p80 = (round(quantile(self.ms, q), 4) for q in (0.2, 0.5, 0.8))
        peak = None if self.peak_mb is None else round(self.peak_mb, 1)
        wall = None if self.wall_ms is None else round(self.wall_ms, 4)
        times = {"ms": median, "ms_p20": p20, "ms_p80": p80, "rounds": len(self.ms)}
        return {**times, "peak_mb": peak, "wall_ms": wall}


def measure(
    variants: Mapping[str, Call | Sequence[Call]],
    *,
    device: torch.device | str,
    seconds: float = 1.0,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    slow_seconds: float = float("inf"),
) -> dict[str, Measured]:
    """Memory, then time, of every variant; one that fails is reported, the others go on.

    Args:
        variants: name -> what to call; several calls are one variant's input sets, used in turn.
        device: where the calls run.
        seconds: how long each variant is timed: at least `min_rounds` calls, at most `max_rounds`.
        slow_seconds: a variant whose call takes longer is timed once, by the call that measures its memory.
    """
    device = torch.device(device)
    calls = {name: [made] if callable(made) else list(made) for name, made in variants.items()}
    results = {name: Measured() for name in calls}
    for name, sets in calls.items():
        warm = _attempt(results[name], lambda sets=sets: _warm_up(sets[0], device))
        if warm is not None:
            start = time.perf_counter()
            results[name].peak_mb = _attempt(results[name], lambda sets=sets: peak_mb(sets[0], device))
            if time.perf_counter() - start > slow_seconds:
                results[name].ms.append(1e3 * (time.perf_counter() - start))
    slow = {name for name, result in results.items() if result.ms}
    settle = next((n for n, result in results.items() if result.status == "ok" and n not in slow), None)
    if device.type == "cuda" and settle is not None:
        _attempt(results[settle], lambda: _warm_up(calls[settle][0], device, WARM_SECONDS))
    gc.collect()
    gc.disable()  # a collection in the middle of a call would be that variant's loss
    try:
        for turn in range(max_rounds):
            owed = [
                name
                for name, result in results.items()
                if result.status == "ok"
                and name not in slow
                and (turn < min_rounds or sum(result.ms) < 1e3 * seconds)
            ]
            for name in owed:
                call = calls[name][turn % len(calls[name])]
                taken = _attempt(results[name], lambda call=call: _ms(call, device))
                if taken is not None:
                    results[name].ms.append(taken)
            if not owed:
                break
        for name, result in results.items():
            if device.type == "cuda" and result.status == "ok" and quantile(result.ms, 0.5) < SHORT_MS:
                result.wall_ms = _attempt(result, lambda name=name: _wall_ms(calls[name], device))
    finally:
        gc.enable()
    return results


def _attempt(result: Measured, step: Callable[[], float | None]) -> float | None:
    """The step's value; where it fails, None and the reason in `result`."""
    if result.status != "ok":
        return None
    try:
        return step()
    except Exception as error:  # whatever a provider raises is a result of the measurement
        result.status = why(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # only here is the traceback gone, which held the failed call's tensors
    return None


def why(error: BaseException) -> str:
    """One line for a row's `status`."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    first = text.splitlines()[0] if text else ""
    return f"error: {type(error).__name__}: {first}"[:200]


def _warm_up(call: Call, device: torch.device, seconds: float = 0.0) -> float:
    """Seconds of one call, which compiles and allocates; a GPU goes on for `seconds`, until its clocks have settled."""
    start = time.perf_counter()
    call()
    while device.type == "cuda":
        torch.cuda.synchronize(device)
        if time.perf_counter() - start >= seconds:
            break
        call()
    return time.perf_counter() - start


def _ms(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Cycles, about 4 ms: Python and its launches are ahead of the device, as in a training step.
    torch.cuda._sleep(8_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wall_ms(sets: Sequence[Call], device: torch.device) -> float:
    """The median time of a call that finds the device idle and is waited for."""
    times = []
    for turn in range(20):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        sets[turn % len(sets)]()
        torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return quantile(times, 0.5)


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def peak_mb(call: Call, device: torch.device | str) -> float | None:
    """MiB that one call adds at its highest point to what lived before it; None where that cannot be known."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    extra = peak_extra_bytes(call)
    return None if extra is None else extra / 2**20


def peak_extra_bytes(call: Call) -> int | None:
    """Bytes above the resident size at the start that the process reached during one call; None but on Linux."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        call()
        return None
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _status_bytes(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# --- what the machine can do ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Floors:
    """Measured ceilings of this machine: one logits-sized product G = 2 N D V FLOP, and copying memory.

    At up to `READS_WEIGHT_ONCE` tokens on a GPU the product is taken to cost what reading W once costs: libraries'
    products of so few rows do not reach that themselves.
    """

    product_ms: float
    copy_gb_s: float  # 1e9 bytes a second, read plus written

    def traffic_ms(self, num_bytes: float) -> float:
        return num_bytes / self.copy_gb_s / 1e6


@functools.cache
def floors(n: int, d: int, v: int, dtype: torch.dtype, device: torch.device | str) -> Floors:
    """Measure both now, in this run, at this shape and dtype (the product in slices of rows where it is large)."""
    device = torch.device(device)
    copy_gb_s = _copy_gb_s(device)
    if reads_weight_once(n, device):
        return Floors(v * d * torch.finfo(dtype).bits / 8 / copy_gb_s / 1e6, copy_gb_s)
    product, slices = bare_product(n, d, v, dtype, device)
    return Floors(_steady_ms(product, device) * slices, copy_gb_s)


def reads_weight_once(n: int, device: torch.device) -> bool:
    return device.type == "cuda" and n <= READS_WEIGHT_ONCE


def bare_product(n: int, d: int, v: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, float]:
    """The library's product of logits' size, of a slice of the rows where it is large; and how many slices there are."""
    limit = 4 << 30 if device.type == "cuda" else 1 << 29
    rows = max(1, min(n, limit // (v * torch.finfo(dtype).bits // 8)))
    hidden, weight = torch.randn(rows, d, device=device).to(dtype), torch.randn(v, d, device=device).to(dtype)
    out = torch.empty(rows, v, device=device, dtype=dtype)
    return lambda: torch.mm(hidden, weight.T, out=out), n / rows


@functools.cache
def _copy_gb_s(device: torch.device) -> float:
    source = torch.ones(1 << 30 if device.type == "cuda" else 1 << 27, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _steady_ms(lambda: target.copy_(source), device) / 1e6


def _steady_ms(step: Call, device: torch.device) -> float:
    """The median of a few calls of something steady."""
    _warm_up(step, device, WARM_SECONDS)
    return quantile([_ms(step, device) for _ in range(10 if device.type == "cuda" else 3)], 0.5)
