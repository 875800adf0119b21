"""Measures providers against each other: `python -m benchmarks.run --preset quick --out FILE.jsonl`.

For every case a correctness gate looks at each provider first, on a small case of the same kind: value and gradients
against plain torch in fp64. Ours have to keep the error budget of `duet_kernels.testing`, peers a loose bound of
published tolerances' size; at full size the losses have to agree with plain torch's. A red gate prints no speed. Memory
and time of all that passed, in turn, beside the floor measured in the same run. Absence, failure and out of memory are
rows too.

    --keep                        with --out: rows that FILE has of other operations or providers stay, with their commit
    --compare A.jsonl B.jsonl     which is faster, row by row
    --table FILE.jsonl            the markdown tables of a result
    --plots FILE.jsonl            time and memory against N, V and k, beside the file
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from benchmarks import harness, report
from benchmarks.cases import OPS, PASSES, Case, Inputs, floor_ms, make_inputs
from benchmarks.definitions import DEFINITIONS, exact_logits, fp32_logits
from benchmarks.harness import Call, Row
from benchmarks.presets import PRESETS
from benchmarks.providers import OURS, Provider, Run, chosen
from duet_kernels import set_workspace_bytes
from duet_kernels.dispatch import workspace_bytes
from duet_kernels.testing import assert_within_budget

# Relative RMS error that a peer may have: rounding of logits to half precision is its own choice, a wrong sign is not.
PEER_BOUND = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
COLD_BYTES = {
    "cpu": 64 << 20,
    "cuda": 256 << 20,
}  # input sets rotate until they add up to more than a cache holds
MAX_SETS = 4


# --- the correctness gate ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    green: bool
    error: float | None = None  # largest relative RMS error of what was judged
    reason: str = ""


def gate(provider: Provider, case: Case, device: torch.device) -> Verdict:
    """Value and gradients of the small case against fp64."""
    return verdict_of(provider, case.small(), device)


def verdict_of(provider: Provider, small: Case, device: torch.device) -> Verdict:
    """Value and gradients of a case against fp64, at its own size."""
    inputs = make_inputs(small, device, seed=1)
    definition = DEFINITIONS[small.op]
    truth = _outcome(small, lambda x: definition(small, x, fp32_logits), inputs.double())
    baseline = _outcome(small, lambda x: definition(small, x, exact_logits), inputs)
    try:
        actual = _outcome(small, provider.build(small), inputs)
    except ImportError as error:
        return Verdict(False, reason=f"absent: {type(error).__name__}: {error}")
    except Exception as error:  # a provider that cannot run the case is a result
        return Verdict(False, reason=harness.why(error))
    if small.op == "linear_topk":
        actual, baseline, truth = (_by_value(o, inputs.double()) for o in (actual, baseline, truth))
    errors = {name: _relative(actual[name], truth[name]) for name in truth}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if provider.name != OURS:
        bad = not errors[worst] <= PEER_BOUND[small.dtype]
        return Verdict(not bad, errors[worst], f"wrong: {worst} errs by {errors[worst]:.1e}" if bad else "")
    try:
        for name in truth:
            assert_within_budget(actual[name], truth[name], baseline[name], name=name)
    except AssertionError as error:
        return Verdict(False, errors[worst], f"wrong: {error}")
    return Verdict(True, errors[worst])


class Judge:
    """The gate's verdicts, each found out once: cases that differ in size only share theirs."""

    def __init__(self, device: torch.device | str, small: Callable[[Case], Case] = Case.small) -> None:
        self.device, self.small = torch.device(device), small
        self.verdicts: dict[tuple[Provider, Case], Verdict] = {}

    def __call__(self, provider: Provider, case: Case) -> Verdict:
        key = provider, self.small(case)
        if key not in self.verdicts:
            self.verdicts[key] = verdict_of(*key, self.device)
        return self.verdicts[key]


def _outcome(case: Case, run: Run, inputs: Inputs) -> dict[str, Tensor]:
    """Everything that is judged, by name: the value or values, and the gradient of each leaf."""
    output = run(inputs)
    if not case.has_gradient:
        return {f"output {i}": part.detach() for i, part in enumerate(output)}
    names = ["dhidden", "dweight"][: len(inputs.leaves)]
    gradients = torch.autograd.grad(output, inputs.leaves)
    wide = torch.float64 if inputs.hidden.dtype == torch.float64 else torch.float32
    return {"loss": output.detach().to(wide), **dict(zip(names, gradients, strict=True))}


def _by_value(outcome: dict[str, Tensor], exact: Inputs) -> dict[str, Tensor]:
    """Ids become the exact logits they point at: equal logits may be chosen either way."""
    z = exact.teacher_hidden @ exact.teacher_weight.T
    at_ids = z.gather(-1, outcome["output 1"]).to(outcome["output 0"].dtype)
    return {"values": outcome["output 0"], "logits at ids": at_ids, "logsumexp": outcome["output 2"]}


def _relative(actual: Tensor, truth: Tensor) -> float:
    difference = (actual.double() - truth.double()).square().mean().sqrt()
    return float(difference / truth.double().square().mean().sqrt())


# --- the measurement --------------------------------------------------------------------------------------------


def benchmark(
    cases: Iterable[Case],
    providers: Sequence[Provider],
    *,
    device: torch.device | str,
    seconds: float = 1.0,
    slow_seconds: float = float("inf"),
    passes: Sequence[str] = PASSES,
    emit: Callable[[Row], None] = lambda row: None,
    judge: Callable[[Provider, Case], Verdict] | None = None,
) -> list[Row]:
    """Rows of every provider that takes each case, `emit`ted as soon as a case is done.

    Args:
        seconds: timed per provider, case and pass.
        slow_seconds: a call that takes longer is timed once.
        passes: of losses ("forward", "full"); an operation without a gradient has its forward only.
        judge: the correctness gate of a provider and a case; None: `Judge`, at the case's small size.
    """
    device = torch.device(device)
    where = harness.environment(device)
    judge = Judge(device) if judge is None else judge
    rows: list[Row] = []
    for case in cases:
        for row in _measure_case(case, providers, device, (seconds, slow_seconds), passes, where, judge):
            rows.append(row)
            emit(row)
    return rows


def _measure_case(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    seconds: tuple[float, float],  # timed, and after how many a call is timed once
    passes: Sequence[str],
    where: dict[str, str],
    judge: Callable[[Provider, Case], Verdict],
) -> list[Row]:
    passes = [p for p in case.passes if p in passes] or list(case.passes[-1:])
    rows: list[Row] = []

    def add(provider: Provider, which: str, **fields: object) -> None:
        rows.append(row_of(case, provider, where, which, device, **fields))

    passed: list[tuple[Provider, Verdict]] = []
    torch.compiler.reset()  # every case is compiled for its own shapes, however many came before
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for provider in (p for p in providers if p.takes(case)):
        absent = provider.absent(case, device)
        if absent is not None:
            add(provider, passes[-1], gate="not run", status=f"absent: {absent}")
            continue
        verdict = judge(provider, case)
        if verdict.green:
            passed.append((provider, verdict))
        elif verdict.reason.startswith("absent"):
            add(provider, passes[-1], gate="not run", status=verdict.reason)
        else:
            red = {"gate": "red", "status": verdict.reason, "error": verdict.error}
            add(provider, passes[-1], **red)
    if not passed:
        return rows
    floors = harness.floors(case.n, case.d, case.v, case.dtype, device)
    product = None
    if device.type == "cuda" and not harness.reads_weight_once(case.n, device):
        product = harness.bare_product(case.n, case.d, case.v, case.dtype, device)
    first = make_inputs(case, device)
    wanted = -(-COLD_BYTES[device.type] // first.num_bytes)
    sets = [first, *(make_inputs(case, device, seed) for seed in range(1, min(MAX_SETS, wanted)))]
    built: dict[str, Run] = {}
    losses: dict[str, Tensor] = {}
    for which in passes:
        variants: dict[str, Call | list[Call]] = {
            p.label: _calls(p, case, sets, which, built, losses) for p, _ in passed
        }
        if product is not None:
            variants["product"] = product[0]  # in turn with the others: a GPU is slower when it is hot
        measured = harness.measure(variants, device=device, seconds=seconds[0], slow_seconds=seconds[1])
        if product is not None:
            took = measured.pop("product").ms
            if took:
                floors = dataclasses.replace(floors, product_ms=harness.quantile(took, 0.5) * product[1])
        wrong = _disagreeing(losses, case.dtype)
        floor = round(floor_ms(case, floors, which), 4)
        for provider, verdict in passed:
            if provider.label in wrong:
                add(provider, which, gate="red", error=verdict.error, status=wrong[provider.label])
            else:
                fields = measured[provider.label].fields()
                fields |= {"floor_ms": floor, "copy_gb_s": round(floors.copy_gb_s, 1)}
                add(provider, which, gate="green", error=verdict.error, **fields)
    return rows


def _disagreeing(losses: dict[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Who was right at the gate's size but at this one has another loss than plain torch has; and what it is."""
    truth = losses.get("torch eager")
    if truth is None:
        return {}
    return {
        label: f"wrong: at this size the loss is {float(loss):.6g}, plain torch's is {float(truth):.6g}"
        for label, loss in losses.items()
        if not abs(float(loss) - float(truth)) <= PEER_BOUND[dtype] * abs(float(truth))
    }


def _calls(
    provider: Provider,
    case: Case,
    sets: Sequence[Inputs],
    which: str,
    built: dict[str, Run],
    losses: dict[str, Tensor],
) -> list[Call]:
    """One call per input set. The provider is built by its first call, which is the warm-up; its loss is kept."""

    def call(inputs: Inputs) -> object:
        if provider.label not in built:
            built[provider.label] = provider.build(case)
        before = set_workspace_bytes(provider.workspace_mb << 20 if provider.workspace_mb else None)
        try:
            output = built[provider.label](inputs)
            if case.has_gradient and inputs is sets[0]:
                losses[provider.label] = output.detach()
            return output if which == "forward" else torch.autograd.grad(output, inputs.leaves)
        finally:
            set_workspace_bytes(before)

    return [lambda inputs=inputs: call(inputs) for inputs in sets]


def row_of(
    case: Case,
    provider: Provider,
    where: dict[str, str],
    which: str,
    device: torch.device | str = "cpu",
    **fields: object,
) -> Row:
    """The row of a case and a provider, with what was found out about them."""
    default = workspace_bytes(torch.device(device)) >> 20 if provider.name == OURS else None
    return Row(
        **where,
        op=case.op,
        provider=provider.name,
        impl=provider.impl,
        n=case.n,
        d=case.d,
        v=case.v,
        k=case.k,
        dtype=str(case.dtype).removeprefix("torch."),
        which_pass=which,
        divergence=case.divergence,
        head=case.head,
        ids=case.ids,
        provider_version=provider.version,
        workspace_mb=provider.workspace_mb or default,
        **fields,
    )


# --- command line -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: cpu on a CPU, anchor on a GPU")
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--providers", nargs="+", help='names, or "name/implementation"')
    for size in "nvkd":
        parser.add_argument(f"--{size}", nargs="+", type=int, help="instead of the preset's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--budget-seconds", type=float, default=1.0, help="timed per provider, case and pass")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--keep", action="store_true", help="what --out holds and is not measured now stays")
    parser.add_argument("--compare", nargs=2, type=pathlib.Path, metavar=("A", "B"))
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--plots", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    for path in filter(None, (*(options.compare or ()), options.table, options.plots)):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    if options.compare:
        print(report.comparison(*(harness.read_rows(path) for path in options.compare)))
    elif options.table or options.plots:
        if options.table:
            print(report.tables(harness.read_rows(options.table)))
        if options.plots:
            _draw(harness.read_rows(options.plots), options.plots.parent)
    else:
        return _run(options)
    return 0


def _run(options: argparse.Namespace) -> int:
    for size in "nvkd":
        if any(value < 1 for value in getattr(options, size) or ()):
            raise SystemExit(f"--{size}: wanted numbers of at least 1, got {getattr(options, size)}")
    name = options.preset or ("cpu" if options.device == "cpu" else "anchor")
    cases = override(PRESETS[name](torch.device(options.device)), options)
    try:
        providers = chosen(options.providers)
    except ValueError as error:
        raise SystemExit(f"--{error}") from None
    if not cases:
        raise SystemExit(f"--ops: the preset {name!r} has no case of {' or '.join(options.ops)}")
    if options.out and options.out.suffix == ".md":
        raise SystemExit(
            f"--out: wanted a file for rows of JSON, got {options.out}; the tables are written beside it, as .md"
        )
    if options.keep and not options.out:
        raise SystemExit("--keep: wanted --out, the file whose rows stay")
    kept = harness.read_rows(options.out) if options.keep and options.out.exists() else []
    here = harness.environment(options.device)
    foreign = [row for row in kept for field in ("device", "torch") if getattr(row, field) != here[field]]
    if foreign:
        was, now = [f"{place['device']}, torch {place['torch']}" for place in (vars(foreign[0]), here)]
        raise SystemExit(f"--keep: the rows of {options.out} are of {was}; this is {now}")
    # An earlier result stays until this one is whole.
    unfinished = options.out and options.out.with_name(f"{options.out.name}.unfinished")
    if unfinished:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text("")
    start = time.perf_counter()
    absent: set[str] = set()  # said once, however many cases

    def emit(row: Row) -> None:
        if unfinished:
            with unfinished.open("a") as file:
                file.write(row.to_json() + "\n")
        said = report.line(row)
        if row.status.startswith("absent"):
            said = f"{row.op} | {row.provider} {row.impl}: {row.status}"
            if said in absent:
                return
            absent.add(said)
        print(f"{time.perf_counter() - start:6.0f} s  {said}", flush=True)

    rows = benchmark(
        cases,
        providers,
        device=options.device,
        seconds=options.budget_seconds,
        passes=options.passes,
        emit=emit,
    )
    if unfinished:
        rows = merged(kept, rows)
        unfinished.write_text("".join(row.to_json() + "\n" for row in rows))
        unfinished.rename(options.out)
        options.out.with_suffix(".md").write_text(report.tables(rows) + "\n")
        _draw(rows, options.out.parent)
    return int(any(row.gate == "red" and row.provider == OURS for row in rows))


def merged(kept: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """Earlier rows that were not measured anew, then the new ones: each has the commit it was measured at.

    A peer that is absent now leaves what was measured of it before.
    """

    def key(row: Row) -> tuple:
        return (*report.case_of(row), row.provider, row.impl)

    kept, measured = list(kept), {key(row) for row in new if not row.status.startswith("absent")}
    before = [row for row in kept if key(row) not in measured]
    known = {key(row) for row in before}
    return before + [row for row in new if key(row) not in known]


def _draw(rows: Sequence[Row], folder: pathlib.Path) -> None:
    """Figures where matplotlib is installed: a GPU's `python3` need not have it."""
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"no figures: {error}; `--plots` draws them from the rows, on any machine")
        return
    for path in plots.draw_all(rows, folder):
        print(path)


def override(cases: Iterable[Case], options: argparse.Namespace) -> list[Case]:
    """The preset's cases with the sizes, operations and dtype of the command line, each once."""
    made: dict[Case, None] = {}
    for case in cases:
        if options.ops and case.op not in options.ops:
            continue
        fields = {"dtype": getattr(torch, options.dtype)} if options.dtype else {}
        variants = [dataclasses.replace(case, **fields)]
        for size in "nvkd":
            values = getattr(options, size)
            if values:
                variants = [dataclasses.replace(c, **{size: value}) for c in variants for value in values]
        made.update(dict.fromkeys(variants))
    return list(made)


if __name__ == "__main__":
    sys.exit(main())
