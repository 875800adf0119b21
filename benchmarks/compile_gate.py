"""Compiles every Triton kernel for GPUs that are not there, and fails on what would make it slow or impossible.

    python -m benchmarks.compile_gate [--arch 90] [--only dhidden] [--json FILE]

The launchers themselves say what is compiled: they run on meta tensors of the anchor's shape with the launch replaced
by a recorder, so signature, tiles and specialisation are those of a real call. Triton compiles that for each target
and its own cuobjdump reads the machine code's resources. The gate is red when a kernel that multiplies (`tl.dot`) or one
of the gathers spills (STACK or LOCAL other than 0), when a product of halves with 64 tokens or more does without sm_90's
`wgmma`, when one of those that read rows has no 16-byte load, or when a kernel needs more shared memory than the chip
has. Prints a markdown table, one row a kernel, target and dtype; `tma` counts the bulk copies of tensor descriptors.

Must run without TRITON_INTERPRET (interpreted functions cannot be compiled). Needs no GPU and measures no time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from duet_kernels.head import LMHead, Need
from duet_kernels.options import DIVERGENCES, RAW, Divergence
from duet_kernels.triton import dense, tiles
from duet_kernels.triton.complement import (
    complement_and_values,
    complement_and_values_backward,
    linear_cross_entropy,
    topk_loss_with_tail,
)
from duet_kernels.triton.dense import times_rows, times_upstream
from duet_kernels.triton.divergence import linear_divergence
from duet_kernels.triton.gather import linear_gather, linear_gather_backward
from duet_kernels.triton.gather_loss import topk_loss
from duet_kernels.triton.stats import token_stats
from duet_kernels.triton.topk import linear_topk
from duet_kernels.triton.topk_divergence import topk_divergence

# The anchor: Llama-3's head at 8192 tokens.
N, D, V, K = 8192, 4096, 128256, 64
ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Bytes of shared memory a program may ask for, and 32-bit registers of a multiprocessor.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel and everything that its machine code depends on."""

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A launcher call that reaches kernels, and what its kernels must satisfy."""

    name: str
    dtype: torch.dtype
    call: Callable[[], object]
    no_spills: bool
    wide_loads: tuple[str, ...] = ()  # kernels that must read 16 bytes an instruction
    may_spill: tuple[
        str, ...
    ] = ()  # kernels without a product, bound by latency: ptxas trades a few bytes for warps
    wgmma: tuple[
        str, ...
    ] = ()  # kernels that must multiply halves on sm_90 with the tensor cores' own instruction


@dataclasses.dataclass(frozen=True)
class Resources:
    """One row of the table."""

    case: str
    kernel: str
    dtype: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    programs_per_sm: int
    wide_loads: int
    wgmma: int
    tma: int
    problems: list[str]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_head(dtype: torch.dtype, d: int, softcap: float | None, scale: float = 1.0, v: int = V) -> LMHead:
    """With a bias where there is a softcap."""
    return LMHead(
        meta(v, d, dtype=dtype), meta(v, dtype=dtype) if softcap is not None else None, softcap, scale
    )


def gather_cases(
    dtype: torch.dtype, d: int = D, k: int = K, softcap: float | None = 30.0, scale: float = 0.5
) -> Iterator[Case]:
    hidden, head = meta(N, d, dtype=dtype), meta_head(dtype, d, softcap, scale)
    indices, values = meta(N, k, dtype=torch.int64), meta(N, k)
    shape = f"D={d} K={k} softcap={softcap} scale={scale}"

    def backward(need: Need):
        return linear_gather_backward(hidden, head, values, values, indices, need)

    # Rows that do not begin on 16 bytes cannot be read 16 bytes at a time.
    wide = (
        ("_forward_kernel", "_dhidden_kernel", "_partial_kernel", "_segments_kernel") if d % 16 == 0 else ()
    )
    yield Case(f"gather {shape}", dtype, lambda: linear_gather(hidden, head, indices), True, wide)
    yield Case(f"gather dh, dW {shape}", dtype, lambda: backward(Need(True, True)), True, wide)
    yield Case(f"gather db {shape}", dtype, lambda: backward(Need(False, False, True)), True)


def topk_loss_cases(
    dtype: torch.dtype, names: tuple[str, ...], d: int = D, k: int = K, softcap: float | None = None
) -> Iterator[Case]:
    """The losses that one kernel makes: of raw logits, with more than half of the slots that it can hold."""
    hidden, head = meta(N, d, dtype=dtype), meta_head(dtype, d, softcap, 0.5)
    ids, teacher, factor = meta(N, k, dtype=torch.int64), meta(N, k), meta(N)
    wide = ("_topk_loss_kernel",) if d % 16 == 0 else ()
    for name in names:
        spec = Divergence(name, "none", 1.0, 0.5, 1.0)
        call = functools.partial(topk_loss, hidden, head, ids, teacher, factor, spec, Need(True))
        yield Case(f"topk loss {name} D={d} K={k} softcap={softcap}", dtype, call, True, wide)


def topk_cases(
    dtype: torch.dtype, n: int = N, k: int = K, v: int = V, softcap: float | None = None
) -> Iterator[Case]:
    hidden, weight, bias = meta(n, D, dtype=dtype), meta(v, D, dtype=dtype), meta(v, dtype=dtype)
    head = LMHead(weight, bias if softcap else None, softcap, 0.5)
    name = f"topk N={n} V={v} K={k} softcap={softcap}"
    call = functools.partial(linear_topk, hidden, head, k, 2.0)
    yield Case(name, dtype, call, True, ("_fold_kernel",), ("_select_kernel",), ("_skinny_kernel",))


def stats_cases(dtype: torch.dtype, n: int = N, v: int = V, softcap: float | None = None) -> Iterator[Case]:
    hidden, weight, bias = meta(n, D, dtype=dtype), meta(v, D, dtype=dtype), meta(v, dtype=dtype)
    head, labels = LMHead(weight, bias if softcap else None, softcap, 0.5), meta(n, dtype=torch.int64)
    call = functools.partial(token_stats, hidden, head, labels)
    yield Case(f"token stats N={n} V={v} softcap={softcap}", dtype, call, True, ("_fold_kernel",))


# Kernels that read or write whole rows of logits, 16 bytes an instruction where their elements are 4 bytes or more.
DENSE_WIDE = (
    "_finish_kernel",
    "_gradient_kernel",
    "_moments_kernel",
    "_softmax_kernel",
    "_sum_kernel",
    "_terms_kernel",
)

WITH_BETA = (*((name, 0.5) for name in DIVERGENCES), ("jsd", 0.3))
# One of probabilities and one of raw logits, where a shape changes the kernels and not the divergence.
DEAREST = ("jsd", 0.3), ("huber", 0.5)


def dense_cases(
    dtype: torch.dtype,
    softcap: float | None = None,
    v: int = V,
    k: int = K,
    n: int = N,
    divergences: tuple[tuple[str, float], ...] = WITH_BETA,
) -> Iterator[Case]:
    hidden, weight, bias = meta(n, D, dtype=dtype), meta(v, D, dtype=dtype), meta(v, dtype=dtype)
    head, need = (
        LMHead(weight, bias if softcap else None, softcap, 0.5),
        Need(True, True, softcap is not None),
    )
    row, labels, ids, values = meta(n), meta(n, dtype=torch.int64), meta(n, k, dtype=torch.int64), meta(n, k)
    shape = f"N={n} V={v} softcap={softcap}"
    wide = DENSE_WIDE if v > 16 else ()

    def divergence(name: str, beta: float):
        raw = not DIVERGENCES[name].normalizations
        spec = Divergence(name, "none" if raw else "renormalize", 1.0 if raw else 2.0, beta, 1.0)
        return linear_divergence(hidden, head, hidden, head, row, spec, need)

    for name, beta in divergences:
        call = functools.partial(divergence, name, beta)
        yield Case(f"dense divergence {name} beta={beta} {shape}", dtype, call, True, wide)
    call = functools.partial(linear_cross_entropy, hidden, head, labels, row, need)
    yield Case(f"cross-entropy {shape}", dtype, call, True, wide)
    call = functools.partial(complement_and_values, hidden, head, ids, 2.0, False, False, Need(True))
    yield Case(f"logsumexp K={k} {shape}", dtype, call, True, wide)
    saved = hidden, head, ids, 2.0, row, values, hidden, row, values
    call = functools.partial(complement_and_values_backward, *saved, need._replace(hidden=False))
    yield Case(f"values and tail backward K={k} {shape}", dtype, call, True, wide)
    spec = Divergence("forward_kl", "tail", 2.0, 0.5, 1.0)
    call = functools.partial(topk_loss_with_tail, hidden, head, ids, values, row, row, spec, need)
    yield Case(f"top-k loss with a tail K={k} {shape}", dtype, call, True, wide, ("_divergence_kernel",))
    call = functools.partial(complement_and_values, hidden, head, ids, 2.0, True, True, Need(True))
    yield Case(f"values, tail and entropy K={k} {shape}", dtype, call, True, wide)
    for out in {dtype, torch.float32}:
        call = functools.partial(times_upstream, meta(v, D, dtype=out), meta(), dtype)
        yield Case(f"upstream gradient {out} {shape}", dtype, call, True, ("_scale_kernel",))
    call = functools.partial(times_rows, meta(n, D, dtype=dtype), meta(n), dtype)
    yield Case(f"upstream gradient of rows {shape}", dtype, call, True, ("_scale_rows_kernel",))


# Every divergence with each of its normalizations.
FORMS = [(name, form) for name, traits in DIVERGENCES.items() for form in traits.normalizations or ("none",)]


def divergence_cases() -> Iterator[Case]:
    slots = [(name, norm, K) for name, norm in FORMS]
    # The dearest one at the two ends of the tile table.
    slots += [("jsd", "tail", 1), ("jsd", "tail", tiles.MAX_SLOTS)]
    for name, norm, k in slots:
        logits, row, spec = meta(N, k), meta(N), Divergence(name, norm, 2.0, 0.5, 1.0)
        call = functools.partial(topk_divergence, logits, logits, row, row, row, spec)
        yield Case(f"{name} {norm} K={k}", torch.float32, call, False)


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield from gather_cases(dtype)
        yield from topk_loss_cases(dtype, RAW)
        yield from topk_loss_cases(dtype, ("huber",), softcap=20.0)
    yield from gather_cases(torch.bfloat16, softcap=20.0, scale=1.0)
    yield from topk_loss_cases(torch.bfloat16, ("mse",), k=33)
    for d in (64, D + 1, D + 2, 16384):
        yield from topk_loss_cases(torch.bfloat16, ("huber",), d=d)
    yield from topk_loss_cases(torch.float32, ("l1",), d=D + 1)
    yield from gather_cases(torch.bfloat16, k=1)
    yield from gather_cases(torch.bfloat16, k=1024)
    yield from gather_cases(torch.bfloat16, d=D + 1)
    for dtype in DTYPES:
        yield from topk_cases(dtype)
        yield from topk_cases(dtype, n=64, softcap=30.0)
        yield from topk_cases(dtype, n=16)
        yield from stats_cases(dtype)
        yield from stats_cases(dtype, n=16, v=262144, softcap=30.0)
        yield from dense_cases(dtype)
        yield from dense_cases(dtype, softcap=30.0)
    yield from topk_cases(torch.bfloat16, softcap=30.0)
    yield from topk_cases(torch.bfloat16, k=1)
    yield from topk_cases(torch.bfloat16, n=64, k=1000)
    yield from topk_cases(torch.bfloat16, k=1000, v=262144)
    yield from topk_cases(torch.bfloat16, n=1, v=50257, softcap=30.0)
    yield from dense_cases(torch.bfloat16, v=50257, divergences=DEAREST)
    yield from dense_cases(torch.bfloat16, k=1000, divergences=())  # which read no ids
    yield from dense_cases(
        torch.bfloat16, n=1, v=3, k=1, divergences=DEAREST
    )  # arguments of 1 are constants of the kernel
    yield from divergence_cases()


def ends(blocks: Iterable[slice]) -> list[slice]:
    """The first, the second and the last of them, in this order: those between are launched as the second is."""
    blocks = list(blocks)
    return blocks if len(blocks) <= 3 else [*blocks[:2], blocks[-1]]


@contextlib.contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Launchers in this context compute nothing: their launches, with the tiles of `arch`, are in the list.

    Of each row of blocks that a dense loss walks, only the ends are walked: the anchor has thousands of blocks.
    """
    launches: list[Launch] = []
    blocks = dense._blocks

    def record(kernel: JITFunction, *args, grid, warmup, **kwargs):
        launches.append(as_launch(kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(tiles, "architecture", lambda device: arch),
        mock.patch.object(dense, "_blocks", lambda rows, height: ends(blocks(rows, height))),
    ):
        yield launches


def as_launch(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """Types and specialisation as Triton's launcher derives them: None and 1 are constants, multiples of 16 aligned."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    values.update({name: value for name, value in kwargs.items() if name in kernel.arg_names})
    signature, constexprs, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (is_int and value == 1):
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
            continue
        signature[parameter.name] = parameter.annotation_type or mangle_type(value)
        if isinstance(value, torch.Tensor) or (is_int and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constexprs, attributes, options)


def compile_launch(launch: Launch, arch: int):
    """Triton's compiled kernel for that compute capability; nothing is loaded on a device."""
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a kernel's machine code, from the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    if not {"REG", "STACK", "LOCAL"} <= found.keys():
        raise RuntimeError(f"cuobjdump said nothing of registers: {dump!r}")
    return found


def examine(case: Case, launch: Launch, arch: int) -> Resources:
    compiled = compile_launch(launch, arch)
    found = usage(compiled.asm["cubin"])
    name, warps, ptx = launch.kernel.fn.__name__, compiled.metadata.num_warps, compiled.asm["ptx"]
    # Registers are handed out 8 at a time to each thread, and a multiprocessor runs at most 64 warps.
    per_thread = -(-found["REG"] // 8) * 8
    wide = len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64", ptx))
    # A product of fp32 has no matrix instruction: there the source says that it is one.
    multiplies = "tl.dot(" in launch.kernel.src or bool(re.search(r"\bmma\.sync|wgmma|tcgen05\.mma", ptx))
    problems = []
    if (multiplies or (case.no_spills and name not in case.may_spill)) and (found["STACK"] or found["LOCAL"]):
        problems.append(f"spills: stack {found['STACK']}, local {found['LOCAL']}")
    if name in case.wide_loads and not wide:
        problems.append("no 16-byte load")
    wgmma = ptx.count("wgmma.mma_async")
    # An instruction of a warp group takes 64 rows: fewer tokens have it only where W's rows take their place.
    wanted = name in case.wgmma or (multiplies and launch.constexprs.get("TOKENS", 64) >= 64)
    if wanted and arch == 90 and case.dtype.itemsize == 2 and not wgmma:
        problems.append("no wgmma")
    if compiled.metadata.shared > SHARED_LIMIT[arch]:
        problems.append(f"shared memory {compiled.metadata.shared} > {SHARED_LIMIT[arch]}")
    return Resources(
        case=case.name,
        kernel=name,
        dtype=str(case.dtype).removeprefix("torch."),
        arch=arch,
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"],
        shared=compiled.metadata.shared,
        warps=warps,
        programs_per_sm=min(REGISTERS // (per_thread * 32 * warps), 64 // warps),
        wide_loads=wide,
        wgmma=wgmma,
        tma=ptx.count("cp.async.bulk"),
        problems=problems,
    )


def run(
    archs: tuple[int, ...] = ARCHITECTURES,
    only: str = "",
    sample: int = 1,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> list[Resources]:
    """The whole gate: every case's distinct launches on every architecture.

    `sample`: of each kernel in each dtype only the first one, the `sample`-th after it, and so on.
    """
    rows = []
    for arch in archs:
        seen: set[str] = set()
        counted: collections.Counter[tuple[str, torch.dtype]] = collections.Counter()
        for case in cases():
            if case.dtype not in dtypes:
                continue
            with recorded(arch) as launches:
                case.call()
            for launch in launches:
                key = repr(
                    (launch.kernel.fn.__name__, launch.signature, launch.constexprs, launch.attributes)
                )
                if key not in seen and only in f"{case.name} {launch.kernel.fn.__name__}":
                    seen.add(key)
                    kind = launch.kernel.fn.__name__, case.dtype
                    if counted[kind] % sample == 0:
                        rows.append(examine(case, launch, arch))
                    counted[kind] += 1
    return rows


def table(rows: list[Resources]) -> str:
    columns = [f.name for f in dataclasses.fields(Resources)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [", ".join(v) or "ok" if isinstance(v, list) else str(v) for v in dataclasses.astuple(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile every Triton kernel offline and check its resources."
    )
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--only", default="", help="part of a case's or kernel's name")
    parser.add_argument(
        "--sample", type=int, default=1, help="of each kernel and dtype every so-many-th launch"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=[str(d).removeprefix("torch.") for d in DTYPES],
        help="default: all",
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if not isinstance(triton.jit(_probe), JITFunction):
        print(
            "compile_gate: TRITON_INTERPRET is set; interpreted kernels cannot be compiled", file=sys.stderr
        )
        return 2
    dtypes = tuple(getattr(torch, name) for name in arguments.dtype or ()) or DTYPES
    rows = run(tuple(arguments.arch or ARCHITECTURES), arguments.only, arguments.sample, dtypes)
    bad = sum(bool(row.problems) for row in rows)
    report = (
        f"`make compile`, triton {triton.__version__}, torch {torch.__version__}; N {N}, D {D}, V {V}, K {K}\n\n"
        f"{table(rows)}\n\n{len(rows)} kernels compiled, {bad} with problems"
    )
    print(report)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(report + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return 1 if bad or not rows else 0


def _probe():
    """Never launched: shows whether this process decorates for the compiler or for the interpreter."""


if __name__ == "__main__":
    sys.exit(main())
