"""Jobs -> rows of a results.jsonl: in order, side by side, until the time is over. A job whose row is there is done."""

from __future__ import annotations

import json
import multiprocessing
import platform
import subprocess
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import duet

RESULTS = "results.jsonl"
Row = dict[str, Any]


class Ended(NamedTuple):
    """What was not done: jobs for which there was no time, and a sentence for each that failed."""

    late: list[Any]
    failed: list[str]


def read_rows(path: Path, job_of: Callable[[Row], Any]) -> dict[Any, Row]:
    """Job -> its row; the last of several.

    Args:
        path: of a results.jsonl; it need not be there.
        job_of: the job of a row; None: it was made under other settings and does not count.

    Raises:
        ValueError: naming the line that is no row.
    """
    rows: dict[Any, Row] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), start=1):
        try:
            row = json.loads(line)
            job = job_of(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: wanted a row of the study, got {line[:80]!r}"
            ) from error
        if job is not None:
            rows[job] = row
    return rows


def append_row(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """So many processes; None: the work is done in this one.

    They are spawned: a forked copy of a process that has met a GPU, or in which torch has run threads, may hang.
    """
    if workers < 0:
        raise ValueError(f"workers: wanted an integer >= 0, got {workers}")
    if workers == 0:
        yield None
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def run_jobs(
    jobs: Sequence[Any],
    work: Callable[[Any], Row | None],
    keep: Callable[[Any, Row], None],
    *,
    pool: ProcessPoolExecutor | None,
    workers: int,
    deadline: float,
    expected: Callable[[Any], float] = lambda job: 0.0,
    failures: Path | None = None,
) -> Ended:
    """Do the jobs in order. One that fails is written down; the others go on.

    Args:
        work: job -> its row; None: it met the deadline and saved what it had. It is sent to the processes.
        keep: called with each row as it comes.
        pool, workers: from `processes`.
        deadline: of `time.monotonic()`; no job is started that would end after it.
        expected: how many seconds a job will take.
        failures: file to which the traceback of a failed job is appended.
    """
    waiting, ended = list(jobs), Ended([], [])
    running: dict[Future, Any] = {}

    def finish(job: Any, result: Callable[[], Row | None]) -> None:
        try:
            row = result()
        except Exception as error:  # one job that fails must not cost the others their time on the machine
            ended.failed.append(f"{job}: {type(error).__name__}: {error}")
            if failures is not None:
                with failures.open("a") as file:
                    file.write(f"{job}\n{traceback.format_exc()}\n")
            return
        if row is None:
            ended.late.append(job)
        else:
            keep(job, row)

    while waiting or running:
        while waiting and len(running) < max(1, workers):
            job = waiting.pop(0)
            if time.monotonic() + expected(job) >= deadline:
                ended.late.append(job)
            elif pool is None:
                finish(job, lambda job=job: work(job))
            else:
                running[pool.submit(work, job)] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
            finish(running.pop(future), future.result)
    return ended


def rows_of_seeds(out: Path) -> dict[int, Row]:
    """Seed -> its row, of a study whose jobs are seeds."""
    return read_rows(out / RESULTS, lambda row: row["seed"])


def run_seeds(seeds: Sequence[int], out: Path, work: Callable[[int], Row], minutes: float = 60.0) -> Ended:
    """Runs the seeds whose rows are missing in this process, and appends them to `out`/results.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    missing, made_with = [seed for seed in seeds if seed not in rows_of_seeds(out)], origin()

    def keep(seed: int, row: Row) -> None:
        append_row(out / RESULTS, {**row, **made_with})

    deadline = time.monotonic() + 60 * minutes
    return run_jobs(missing, work, keep, pool=None, workers=0, deadline=deadline)


def made_with(rows: Sequence[Row]) -> str:
    """CPU minutes of the rows of a study, their commits and versions, for its page.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("rows: wanted at least one row of the study, got none")
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    return f"{minutes:.0f} CPU minutes; {origins(rows)}"


def origins(rows: Sequence[Row]) -> str:
    """The versions that made rows, each with its commits."""
    commits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        commits[f"torch {row['torch']}, transformers {row['transformers']}"].add(row["commit"])
    return "; ".join(f"commit {', '.join(sorted(of))}, {how}" for how, of in sorted(commits.items()))


def minutes_since(began: float) -> str:
    return f"{(time.monotonic() - began) / 60:5.1f} min"


def origin() -> dict[str, str]:
    """What a row was made with: commit (marked where files of the package differ from it) and versions."""
    git = ["git", "-C", str(Path(duet.__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True)
        mark = "+changes" if changed.stdout.strip() else ""
        commit = (commit.stdout.strip() or "unknown") + mark
    except OSError:
        commit = "unknown"
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    return {"commit": commit, "python": platform.python_version(), **versions}
