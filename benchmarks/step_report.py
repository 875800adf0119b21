"""What a measured training step says: ideal speed-up, shares, goals; as JSON rows and as Markdown.

The letters are those of `benchmarks.training_step`. Knows measurements, nothing of how they were made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.harness import Measured, quantile, version

IDEAL = (
    "Neither ideal is a limit. The first one leaves out H, the teacher's top-k, which a cached teacher saves too, so that more than "
    "100% of it is possible; the second one counts H. Neither counts what else a live teacher needs (its batch, switching the "
    "adapter), and S, F and H are medians of calls by themselves, which scatter."
)
CACHED_GOAL, LOSS_GOAL, LOSS_GOAL_TOKENS = 0.9, 0.05, 4096
TRAINERS = ("cached teacher", "live teacher", "TRL SDFT")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch. `prompt`, `prefix` and `answer` are tokens a row; `compared`: trainers, not only the loss."""

    layers: int
    d: int
    mlp: int
    heads: int
    kv_heads: int
    v: int
    batch: int
    prompt: int
    prefix: int
    answer: int
    k: int = 64
    tied: bool = False
    compared: bool = True

    @property
    def n(self) -> int:
        """Scored positions."""
        return self.batch * self.answer


@dataclasses.dataclass
class Run:
    """What one shape gave: a `Measured` of every variant, tokens read by student and teacher, the gate's losses."""

    shape: Shape
    dtype: torch.dtype
    took: dict[str, Measured]
    student_tokens: int
    teacher_tokens: int
    losses: dict[str, float]

    def ms(self, name: str) -> float:
        return quantile(self.took[name].ms, 0.5)

    @property
    def green(self) -> bool:
        wanted, tolerance = self.losses["definition"], 1e-4 if self.dtype == torch.float32 else 2e-2
        return wanted > 0 and all(abs(loss - wanted) <= tolerance * wanted for loss in self.losses.values())

    def loss_share(self, variant: str) -> float | None:
        """Of a step: everything between the hidden states and the loss, forward and backward, the teacher's too."""
        parts = {"live teacher": ("loss", "top-k"), "TRL SDFT": ("loss of TRL SDFT",)}.get(variant, ("loss",))
        if any(self.took[part].status != "ok" for part in parts):
            return None
        return sum(map(self.ms, parts)) / self.ms(variant)

    def facts(self) -> dict[str, float]:
        """r, F, H, S in ms, the two ideals, what was reached, and the loss's share of a step."""
        step, loss = self.ms("student alone"), self.ms("loss")
        facts = {
            "S": step,
            "loss": loss,
            "loss share": loss / step,
            "loss share by difference": 1 - self.ms("student alone, no loss") / step,
        }
        if self.shape.compared:
            r, forward, head = self.teacher_tokens / self.student_tokens, self.ms("forward"), self.ms("top-k")
            ideal, with_head = 1 + r * forward / step, 1 + (r * forward + head) / step
            reached = self.ms("live teacher") / self.ms("cached teacher")
            facts |= {"r": r, "F": forward, "H": head, "ideal": ideal, "ideal with head": with_head}
            facts |= {
                "reached": reached,
                "fraction": reached / ideal,
                "fraction with head": reached / with_head,
            }
        return facts


def rows_of(name: str, run: Run, where: dict[str, str]) -> Iterator[dict[str, object]]:
    """One JSON row a variant, the facts in the row of the student alone."""
    for variant, measured in run.took.items():
        row = {
            **where,
            "op": "training_step",
            "shape": name,
            "variant": variant,
            **dataclasses.asdict(run.shape),
        }
        row |= {"n": run.shape.n, "dtype": str(run.dtype).removeprefix("torch."), "status": measured.status}
        row |= {
            "student_tokens": run.student_tokens,
            "teacher_tokens": run.teacher_tokens,
            **measured.fields(),
        }
        if variant in (*TRAINERS, "student alone") and measured.status == "ok":
            row["tokens_s"] = round(1e3 * run.student_tokens / run.ms(variant))
            row["loss_share"] = run.loss_share(variant)
        if variant == "student alone":
            row["facts"] = run.facts()
        if variant == "TRL SDFT":
            row["provider_version"] = version("trl")
        yield row


def runs_of(rows: Iterable[dict[str, Any]]) -> dict[str, Run]:
    """The runs that `rows_of` wrote down, by the name of their shape; of each variant's times three quantiles are left."""
    runs: dict[str, Run] = {}
    for row in rows:
        if row["shape"] not in runs:
            shape = Shape(**{field.name: row[field.name] for field in dataclasses.fields(Shape)})
            tokens = row["student_tokens"], row["teacher_tokens"]
            runs[row["shape"]] = Run(shape, getattr(torch, row["dtype"]), {}, *tokens, {})
        times = [row[field] for field in ("ms_p20", "ms", "ms_p80")] if row["status"] == "ok" else []
        runs[row["shape"]].took[row["variant"]] = Measured(times, row.get("peak_mb"), row["status"])
    return runs


def table_of(name: str, run: Run, on_gpu: bool) -> tuple[str, bool]:
    """Markdown, and whether every goal that is judged here is met."""
    s, facts = run.shape, run.facts()
    lines = [
        f"### {name}: {s.layers} layers x {s.d}, V = {s.v}, K = {s.k}, N = {s.n} scored positions",
        "",
        f"Batch of {s.batch} rows; prompt {s.prompt}, answer {s.answer}, the teacher's prefix {s.prefix} tokens.",
        "",
        "| | ms (p20 - p80) | student's tokens / s | extra memory of a step, MiB | the loss's share |",
        "|---|---|---|---|---|",
    ]
    for variant in (*(TRAINERS if s.compared else ()), "student alone"):
        took = run.took[variant]
        if took.status != "ok":
            lines.append(f"| {variant} | {took.status} | – | – | – |")
            continue
        p20, ms, p80 = (quantile(took.ms, q) for q in (0.2, 0.5, 0.8))
        share, peak = run.loss_share(variant), "–" if took.peak_mb is None else f"{took.peak_mb:.0f}"
        share = "–" if share is None else f"{share:.1%}"
        rate = 1e3 * run.student_tokens / ms
        lines.append(f"| {variant} | {ms:.0f} ({p20:.0f} - {p80:.0f}) | {rate:.0f} | {peak} | {share} |")
    lines += [
        "",
        f"S = {facts['S']:.1f} ms, loss = {facts['loss']:.2f} ms: {facts['loss share']:.2%} of S "
        f"({facts['loss share by difference']:.1%} by difference).",
    ]
    judged: list[tuple[str, str, bool | None]] = []
    if s.compared:
        lines += [
            f"r = {run.teacher_tokens} / {run.student_tokens} = {facts['r']:.3f}, F = {facts['F']:.1f} ms, "
            f"H = {facts['H']:.1f} ms. Cached over live: {facts['reached']:.2f} x. Ideal 1 + r F / S = "
            f"{facts['ideal']:.2f} ({facts['fraction']:.0%} reached); with the teacher's head "
            f"{facts['ideal with head']:.2f} ({facts['fraction with head']:.0%}). {IDEAL}",
        ]
        met = facts["fraction"] >= CACHED_GOAL
        judged.append((f"cached >= {CACHED_GOAL:.0%} of 1 + r F / S", f"{facts['fraction']:.1%}", met))
        met = facts["fraction with head"] >= CACHED_GOAL
        judged.append(
            (f"cached >= {CACHED_GOAL:.0%} of 1 + (r F + H) / S", f"{facts['fraction with head']:.1%}", met)
        )
    at_goal = on_gpu and s.n >= LOSS_GOAL_TOKENS and name == "1b"
    met = facts["loss share"] < LOSS_GOAL if at_goal else None
    goal = f"loss < {LOSS_GOAL:.0%} of a step of a 1B-shaped model, N >= {LOSS_GOAL_TOKENS}"
    judged.append((goal, f"{facts['loss share']:.2%}" + ("" if at_goal else " at this shape"), met))
    words = {True: "yes", False: "NO", None: "not judged here"}
    lines += ["", "| goal | measured | met |", "|---|---|---|"]
    lines += [f"| {goal} | {found} | {words[met]} |" for goal, found, met in judged]
    return "\n".join(lines), all(met is not False for _, _, met in judged)


# --- sections ---------------------------------------------------------------------------------------------------

STUDENT_PHASES = ("student forward", "loss", "loss backward", "backward", "clip", "optimizer", "end")
GIB_PHASES = ("teacher's forward", "activations", "loss", "backward")


def phases_text(name: str, shape: Shape, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of what `benchmarks.step_sections` found: a table of all sections, one of their phases, one of their memory."""
    found = [row for row in rows if row["op"] == "training_step_phases"]
    planned = {row["section"]: row["gib"] for row in rows if row["op"] == "training_step_plan"}
    ok = [row for row in found if row["status"] == "ok"]
    lines = [
        f"### {name}: {shape.layers} layers x {shape.d}, V = {shape.v}, K = {shape.k}, step by step",
        "",
        "| | tokens of student / teacher | N | step, ms | student's tokens / s | loss and top-k | peak GiB (planned) | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row["status"] != "ok":
            lines.append(f"| {row['section']} | {row['status']} | | | | | | |")
            continue
        gib, plan = row["gib"], planned.get(row["section"], {})
        lines.append(
            f"| {row['section']} | {row['student_tokens']} / {row['teacher_tokens']} | {row['n']} | {row['step_ms']:.0f} | "
            f"{1e3 * row['student_tokens'] / row['step_ms']:.0f} | {row['loss_share']:.2%} | "
            f"{_gib(gib, 'peak')} ({_gib(plan, 'peak')}) | {_goal(row)} |"
        )
    phases = list(dict.fromkeys(phase for row in ok for phase in row["ms"]))
    lines += _table(
        "ms", phases, ok, lambda row, phase: f"{row['ms'][phase]:.1f}" if phase in row["ms"] else "–"
    )
    columns = ["weights", "adapter", "optimizer", "standing", *GIB_PHASES, "peak", "reserved", "card"]
    lines += _table(
        "GiB (planned); phases above what stands",
        columns,
        ok,
        lambda row, key: _gib(row["gib"], key) + _beside(planned.get(row["section"], {}), key),
    )
    lines += _same_work(ok)
    hashed = [f"{row['hash_s']:.2f}" for row in ok]
    return "\n".join([*lines, "", f"Hash of the weights: {', '.join(hashed) or '–'} s."])


def _same_work(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What two sections that differ in the teacher alone took for the same work: how far a section can be trusted."""
    lines: list[str] = []
    for live in (row for row in rows if not row["cached"]):
        alike = ("positions", "checkpointing", "nf4", "batch")
        pairs = [row for row in rows if row["cached"] and all(row[key] == live[key] for key in alike)]
        for cached in pairs:
            took = [sum(row["ms"].get(phase, 0.0) for phase in STUDENT_PHASES) for row in (live, cached)]
            lines += [
                "",
                f'"{live["section"]}" and "{cached["section"]}" do the same work from the student\'s forward pass on. They took '
                f"{took[0]:.0f} and {took[1]:.0f} ms for it: {took[0] - took[1]:.0f} of the "
                f"{live['step_ms'] - cached['step_ms']:.0f} ms between their steps are not the teacher's.",
            ]
    return lines


def _table(title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]], cell: Any) -> list[str]:
    if not rows:
        return []
    head = ["", f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    return head + [
        f"| {row['section']} | " + " | ".join(cell(row, key) for key in columns) + " |" for row in rows
    ]


def _gib(sizes: dict[str, float], key: str) -> str:
    return f"{sizes[key]:.2f}" if key in sizes else "–"


def _beside(sizes: dict[str, float], key: str) -> str:
    return f" ({sizes[key]:.2f})" if key in sizes else ""


def goal_met(row: dict[str, Any]) -> bool | None:
    """Whether a section's peak stayed below its goal; None where that is not judged."""
    goal, peak = row["goal_gib"], row.get("gib", {}).get("peak")
    return None if goal is None or peak is None else peak <= goal


def _goal(row: dict[str, Any]) -> str:
    if row["goal_gib"] is None:
        return ""
    words = {True: "yes", False: "NO", None: "not judged here"}[goal_met(row)]
    return f"<= {row['goal_gib']:g} GiB: {words}"
