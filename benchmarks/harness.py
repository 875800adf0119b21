"""Timing and memory of callables, one JSON row a measurement. Knows nothing of what it measures.

Time: variants run in turn, A B C A B C ..., so that a drifting machine slows all alike; median with p20 and p80.
Memory: the highest resident size during one call minus the resident size before it, from a high-water mark that is
reset before the call (Linux: /proc/self/clear_refs), so inputs do not count and outputs do.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import torch


@dataclasses.dataclass
class Row:
    """One measurement. `ms` and `peak_mb` are None when the correctness gate was red."""

    commit: str
    device: str
    torch: str
    triton: str
    gate: str
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
    ms: float | None
    ms_p20: float | None
    ms_p80: float | None
    peak_mb: float | None
    floor_ms: float | None = None

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        fields["pass"] = fields.pop("which_pass")
        return json.dumps(fields)


def environment() -> dict[str, str]:
    """The fields of a row that say where it was measured."""
    return {
        "commit": _commit(),
        "device": device_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def _commit() -> str:
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../duet_kernels"], capture_output=True, text=True, check=False
    )
    return (head.stdout.strip() or "unknown") + ("+changes" if changed.stdout.strip() else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def interleaved_seconds(
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, the variants in turn."""
    for _ in range(warmup):
        for call in variants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            gc.collect()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Bytes above the resident size at the start that the process reached during one call (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
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
