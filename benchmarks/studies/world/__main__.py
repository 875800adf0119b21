"""`python -m benchmarks.studies.world`: the questions that DUET leaves open, over seeds, in the tiny world.

    python -m benchmarks.studies.world                          every arm and seed that is not in results.jsonl yet, then the page
    python -m benchmarks.studies.world --quick                  core arms, two seeds, fewer questions of a kind
    python -m benchmarks.studies.world --report                 the page and its figures from the rows there are
    python -m benchmarks.studies.world duet_deep --seeds 0 1    one method's scorecard on the validation wordings, to look at

A job is one arm and one seed; its row is appended when it is done, so a study that was stopped goes on where it was.
Rows made under other settings of an arm count as not there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.studies import runner
from duet.demo.workplace import one_thread

from .arms import ARMS, QUICK_ARMS
from .job import SCALES, Scale, run, run_arm
from .page import write_report
from .recipes import find_recipe

OUT = Path("benchmarks/results/study")
SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0, 1)
BUDGET_MINUTES, QUICK_BUDGET_MINUTES = 60.0, 10.0
Row = dict[str, Any]


class Job(NamedTuple):
    arm: str
    seed: int


def jobs_in_order(arms: Iterable[str], seeds: Sequence[int]) -> list[Job]:
    """Tier by tier; within a tier seed by seed, so that a study stopped early has equally many seeds of each arm."""
    arms = list(arms)
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"arms: wanted some of {', '.join(ARMS)}, got {unknown[0]!r}")
    return [
        Job(arm, seed)
        for tier in sorted({ARMS[arm].tier for arm in arms})
        for seed in seeds
        for arm in arms
        if ARMS[arm].tier == tier
    ]


def settings_hash(arm: str, scale: Scale) -> str:
    """Of all that decides an arm's numbers apart from the seed and the code."""
    chosen = ARMS[arm]
    recipes = [astuple(find_recipe(name)) for name, _ in chosen.stages]
    decides = [chosen.stages, chosen.forget_authors, chosen.retain, recipes, astuple(scale)]
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()


def read_rows(path: Path) -> list[Row]:
    """The rows of a results.jsonl whose settings are today's; the last of several for the same job."""

    def job_of(row: Row) -> Job | None:
        known = row["arm"] in ARMS and row["hash"] == settings_hash(row["arm"], SCALES[row["scale"]])
        return Job(row["arm"], row["seed"]) if known else None

    return list(runner.read_rows(path, job_of).values())


def _work(scale: Scale, job: Job) -> Row:
    return run_arm(*job, scale)


def study(
    jobs: Sequence[Job],
    out: Path,
    scale: Scale,
    workers: int = 2,
    budget_minutes: float = BUDGET_MINUTES,
    work: Callable[[Scale, Job], Row] = _work,
    say: Callable[[str], None] = print,
) -> runner.Ended:
    """Run the jobs whose rows are missing, in order, and append each row to `out`/results.jsonl.

    Args:
        workers: processes of one thread each; 0 runs in this process.
        budget_minutes: after this much wall time no job is started; those that run are awaited.

    Returns:
        what was not run, and what failed.
    """
    began, made_with = time.monotonic(), runner.origin()
    out.mkdir(parents=True, exist_ok=True)
    path = out / runner.RESULTS
    there = {Job(row["arm"], row["seed"]) for row in read_rows(path)}
    waiting = [job for job in jobs if job not in there]
    say(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done before")

    def keep(job: Job, row: Row) -> None:
        runner.append_row(path, {**row, "hash": settings_hash(job.arm, scale), **made_with})
        say(f"{runner.minutes_since(began)}  {job.arm} seed {job.seed}")

    deadline = began + 60 * budget_minutes
    with runner.processes(workers) as pool:
        return runner.run_jobs(
            waiting, partial(work, scale), keep, pool=pool, workers=workers, deadline=deadline
        )


def show_scorecards(
    methods: Sequence[str], seeds: Sequence[int], split: str, options: dict[str, Any]
) -> None:
    for name in methods:
        for seed in seeds:
            with one_thread():
                print(json.dumps(run(name, seed, split, options=options)), flush=True)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", nargs="*", help="scorecards of these methods; a+b runs one after the other")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4; --quick: 0 and 1")
    parser.add_argument(
        "--split", choices=["validation", "report"], default="validation", help="of scorecards"
    )
    parser.add_argument(
        "--options", type=json.loads, default={}, help="DuetConfig options of the last method, as JSON"
    )
    parser.add_argument("--arms", nargs="+", help=f"of the study; all: {' '.join(ARMS)}")
    parser.add_argument("--quick", action="store_true", help="ten minutes on two cores")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--budget-minutes", type=float, help="no new job after it; default: 60, with --quick 10"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    parser.add_argument("--out", type=Path, help=f"default: {OUT}, with --quick {OUT / 'quick'}")
    chosen = parser.parse_args()
    if chosen.method:
        show_scorecards(chosen.method, chosen.seeds or (0, 1, 2), chosen.split, chosen.options)
        return
    scale = SCALES["quick" if chosen.quick else "full"]
    seeds = chosen.seeds or (QUICK_SEEDS if chosen.quick else SEEDS)
    arms = chosen.arms or (QUICK_ARMS if chosen.quick else ARMS)
    out = chosen.out or (OUT / "quick" if chosen.quick else OUT)
    jobs = jobs_in_order(arms, seeds)
    if not chosen.report:
        default = QUICK_BUDGET_MINUTES if chosen.quick else BUDGET_MINUTES
        minutes = default if chosen.budget_minutes is None else chosen.budget_minutes
        ended = study(jobs, out, scale, chosen.workers, minutes, say=lambda text: print(text, flush=True))
        if ended.late:
            print("not run: " + ", ".join(f"{job.arm} seed {job.seed}" for job in ended.late))
        for failure in ended.failed:
            print(f"failed: {failure}")
    rows = read_rows(out / runner.RESULTS)
    print(f"wrote {write_report(rows, out, seeds)}")


if __name__ == "__main__":
    main()
