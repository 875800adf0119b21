"""Runs the checks, in processes of their own, and writes one row of JSON a check.

Most of a first run is compiling, which several processes do at once; and what a broken kernel does to a process (an
illegal address takes the whole CUDA context along, an endless loop never returns) ends with it. A red check stops no
other. A check that the time did not suffice for is `not run`, and then the gate is not green.

Must not know what is checked.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import IO, Any

import torch

from benchmarks.gpu import conduct, correctness, limits
from benchmarks.gpu.suite import Check, Skip, Suite
from benchmarks.harness import environment
from duet_kernels.testing import Error

ROOT = pathlib.Path(__file__).parents[2]
SHARED = 0.6  # of the time for checks that run side by side; the rest is for those that need the GPU alone
START_SECONDS = 30.0  # a process may take to start and to import before its first check
BYTES_A_WORKER = 8 << 30  # of a GPU's memory: a CUDA context, and a case with its truth in fp64

GREEN, RED, NOT_RUN = "green", "red", "not run"


def checks_of(suite: Suite) -> list[Check]:
    """Every check, the ones that say most first."""
    sections = *correctness.SECTIONS, conduct.conduct, *limits.SECTIONS, conduct.sanitizer
    return [check for section in sections for check in section(suite)]


# --- one check --------------------------------------------------------------------------------------------------


def row_of(check: Check, status: str, seconds: float = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "section": check.section,
        "check": check.name,
        "status": status,
        "seconds": round(seconds, 2),
        **more,
    }


def perform(check: Check) -> dict[str, Any]:
    """The row of one check: whatever it raises is its result."""
    row, start = row_of(check, GREEN), time.perf_counter()
    try:
        result = check.run()
    except Skip as reason:
        row["status"] = str(reason)
    except Exception as error:  # a check that cannot even run has failed
        last = traceback.extract_tb(error.__traceback__)[-1]
        row["status"] = RED
        said = f"{type(error).__name__}: {error} ({pathlib.Path(last.filename).name}:{last.lineno})"
        row["said"] = said[:600]
    else:
        if isinstance(result, Error):
            row["error"], row["budget"] = result
        elif result is not None:
            row["said"] = str(result)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


# --- processes that perform checks ------------------------------------------------------------------------------


def serve(checks: Iterable[Check]) -> None:
    """A worker: titles come in by line, rows go out by line. After a red check it ends, and another one goes on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    by_title = {check.title: check for check in checks}
    for line in sys.stdin:
        row = perform(by_title[line.rstrip("\n")])
        print(json.dumps(row), file=answers, flush=True)
        if row["status"] == RED:
            return


class Worker:
    """One process and the pipe to it, started when first asked, started anew when it has ended."""

    def __init__(self, command: list[str], log: IO[str]) -> None:
        self.command, self.log = command, log
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, check: Check) -> dict[str, Any]:
        """The check's row; a process that dies or hangs makes it a red one."""
        if self.process is None or self.process.poll() is not None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, cwd=ROOT
            )
        process, start = self.process, time.perf_counter()
        assert process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(check.seconds + START_SECONDS, process.kill)
        alarm.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(check.title + "\n")
                process.stdin.flush()
            answer = process.stdout.readline()
        finally:
            alarm.cancel()
        if answer:
            row = json.loads(answer)
            if row["status"] == RED:
                self.close()
            return row
        seconds = time.perf_counter() - start
        status = process.wait()
        hung = seconds > check.seconds
        said = f"no answer in {seconds:.0f} s" if hung else f"its process died with exit status {status}"
        return row_of(check, RED, seconds, said=said)

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:  # a broken context may not let go
                self.process.kill()
                self.process.wait()
            self.process = None


def run_checks(
    checks: list[Check],
    ask: Callable[[], Callable[[Check], dict[str, Any]]],
    jobs: int,
    seconds: float,
    report: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Every check's row, in the order of `checks`; `ask()` makes what answers, one for each of `jobs` threads."""
    end = time.monotonic() + seconds
    rows: dict[str, dict[str, Any]] = {}
    together = [check for check in checks if not check.alone]
    alone = [check for check in checks if check.alone]
    shared = SHARED * seconds if alone else seconds
    for batch, workers, until in ((together, jobs, end - seconds + shared), (alone, 1, end)):
        waiting: queue.SimpleQueue[Check] = queue.SimpleQueue()
        for check in batch:
            waiting.put(check)

        def work(waiting: queue.SimpleQueue[Check] = waiting, until: float = until) -> None:
            with contextlib.ExitStack() as stack:
                answer = ask()
                stack.callback(getattr(answer, "close", lambda: None))
                while True:
                    try:
                        check = waiting.get_nowait()
                    except queue.Empty:
                        return
                    row = answer(check) if time.monotonic() < until else row_of(check, NOT_RUN)
                    rows[check.title] = row
                    report(row)

        threads = [threading.Thread(target=work) for _ in range(min(workers, len(batch)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [rows[check.title] for check in checks]


# --- the gate ---------------------------------------------------------------------------------------------------


def colour(rows: Iterable[dict[str, Any]]) -> str:
    """red, `not run` when time ran out, or green. A gate without a green check is red: it has shown nothing."""
    statuses = {row["status"] for row in rows}
    if RED in statuses or GREEN not in statuses:
        return RED
    return NOT_RUN if NOT_RUN in statuses else GREEN


def summary(rows: list[dict[str, Any]]) -> str:
    """A line a section, then every check that is not green, with what it said."""
    lines = [
        "| section | checks | green | red | other | worst error / budget | s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for section in dict.fromkeys(row["section"] for row in rows):
        mine = [row for row in rows if row["section"] == section]
        counts = collections.Counter(row["status"] for row in mine)
        used = [row["error"] / row["budget"] for row in mine if row.get("budget")]
        other = len(mine) - counts[GREEN] - counts[RED]
        worst = f"{max(used):.2f}" if used else ""
        seconds = sum(row["seconds"] for row in mine)
        lines.append(
            f"| {section} | {len(mine)} | {counts[GREEN]} | {counts[RED]} | {other} | {worst} | {seconds:.0f} |"
        )
    reasons = collections.defaultdict(list)
    for row in rows:
        if row["status"] == RED:
            lines.append(f"\nRED {row['section']}/{row['check']}\n    {row.get('said', '')}")
        elif row["status"] != GREEN:
            reasons[row["status"]].append(f"{row['section']}/{row['check']}")
    for reason, titles in reasons.items():
        more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
        lines.append(f"\n{reason}: {', '.join(titles[:3])}{more}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace, out: pathlib.Path) -> str:
    """The gate's colour; its rows are in gate.jsonl."""
    suite = Suite(torch.device(arguments.device), arguments.quick)
    checks = [check for check in checks_of(suite) if selected(check.title, arguments)]
    jobs = arguments.jobs if arguments.jobs is not None else default_jobs(suite.device)
    where = {**environment(suite.device), "python": platform.python_version()}
    out.mkdir(parents=True, exist_ok=True)
    path, start, done, lock = out / "gate.jsonl", time.perf_counter(), [0], threading.Lock()

    with path.open("w") as file, tempfile.TemporaryFile("w+") as log:

        def report(row: dict[str, Any]) -> None:
            with lock:
                print(json.dumps({**where, **row}), file=file, flush=True)
                done[0] += 1
                if row["status"] == RED or done[0] % 50 == 0:
                    print(f"{time.perf_counter() - start:5.0f} s  {done[0]}/{len(checks)}  {row['status']}  "
                          f"{row['section']}/{row['check']}  {row.get('said', '')}", flush=True)  # fmt: skip

        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "--device", arguments.device]
        command += ["--quick"] if arguments.quick else []
        ask = (lambda: Worker(command, log)) if jobs else (lambda: perform)
        rows = run_checks(checks, ask, max(jobs, 1), arguments.gate_seconds, report)
        log.seek(0)
        noise = log.read()
    result = colour(rows)
    print(summary(rows))
    if result == RED and noise:
        print("\nthe workers' last words:\n" + noise[-4000:])
    print(f"\ncorrectness gate: {result.upper() if result == RED else result}, {len(rows)} checks in "
          f"{time.perf_counter() - start:.0f} s, {path}")  # fmt: skip
    return result


def selected(title: str, arguments: argparse.Namespace) -> bool:
    wanted = not arguments.only or any(text in title for text in arguments.only)
    return wanted and not any(text in title for text in arguments.skip)


def default_jobs(device: torch.device) -> int:
    """Processes for a GPU's first run, which is mostly compiling; 0, this process, for the interpreter."""
    if device.type != "cuda":
        return 0
    _, total = torch.cuda.mem_get_info(device)
    return max(1, min((os.cpu_count() or 1) - 1, total // BYTES_A_WORKER, 12))
