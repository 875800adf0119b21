"""Runs the checks in a few long-lived processes and writes one row of JSON a check, behind one that says where.

Most of a first run is compiling, which the processes do side by side; what one has compiled the others find in Triton's
cache. They are forked from a server that has imported torch, so that starting one anew takes no import: it is done when
the device no longer answers (an illegal access stays in a process), when a process died, and when a check never returned.
A red check stops no other. A check that the time did not suffice for is `not run`, and then the gate is not green.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import pathlib
import platform
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu import conduct, correctness, limits
from benchmarks.gpu.suite import Check, Skip, Suite
from benchmarks.harness import answers, clocks_in_words, environment
from duet_kernels.testing import Error

SHARED = 0.75  # of the time for checks that run side by side; the rest is for those that need the GPU alone
START_SECONDS = 60.0  # a process may take to start and to reach the GPU before its first check
BYTES_A_WORKER = 5 << 30  # of a GPU's memory: a CUDA context, and a case with its truth in fp64
PROGRESS_SECONDS = 10.0

GREEN, RED, NOT_RUN = "green", "red", "not run"


def checks_of(suite: Suite) -> list[Check]:
    """Every check: the long ones first, then the ones that say most."""
    sections = conduct.sanitizer, *correctness.SECTIONS, conduct.conduct, *limits.SECTIONS
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


def serve(pipe: Connection, device: str, quick: bool, log: str) -> None:
    """A worker: titles come in, rows go out, each with whether it is the worker's last."""
    with open(log, "a") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    torch.set_num_threads(1)  # the processes share the cores
    by_title = {check.title: check for check in checks_of(Suite(torch.device(device), quick))}
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            row = perform(by_title[pipe.recv()])
            last = not answers(device)
            if last and row["status"] != RED:  # the error of a kernel that nothing has waited for
                row |= {"status": RED, "said": "the device no longer answers after it"}
            pipe.send((row, last))
            if last:
                return


class Worker:
    """One process and the pipe to it, started when first asked, started anew when it has ended."""

    server = multiprocessing.get_context("forkserver")
    lock = threading.Lock()  # multiprocessing keeps one list of children

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.target, self.arguments = target, arguments
        self.process: Any = None

    def start(self) -> None:
        with self.lock:
            self.pipe, theirs = self.server.Pipe()
            self.process = self.server.Process(target=self.target, args=(theirs, *self.arguments))
            self.process.start()
            theirs.close()

    def __call__(self, check: Check) -> dict[str, Any]:
        """The check's row; a process that dies or hangs makes it a red one."""
        start = time.perf_counter()
        if self.process is None:
            self.start()
        try:
            self.pipe.send(check.title)
            if self.pipe.poll(check.seconds + START_SECONDS):
                row, last = self.pipe.recv()
                if last:
                    self.close()
                return row
            said = f"no answer in {time.perf_counter() - start:.0f} s"
            self.process.kill()
            self.close()
        except (EOFError, OSError):
            said = f"its process died with exit status {self.close()}"
        return row_of(check, RED, time.perf_counter() - start, said=said)

    def release(self) -> None:
        """The process ends by itself when it sees that its pipe is closed."""
        if self.process is not None:
            self.pipe.close()

    def close(self) -> int | None:
        """End the process; its exit status."""
        if self.process is None:
            return None
        self.pipe.close()
        with self.lock:
            self.process.join(timeout=10)
            if self.process.exitcode is None:  # a broken context may not let go
                self.process.kill()
                self.process.join()
        status, self.process = self.process.exitcode, None
        return status


def run_checks(
    checks: list[Check],
    workers: list[Callable[[Check], dict[str, Any]]],
    seconds: float,
    report: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Every check's row, in the order of `checks`: side by side, then, by the first worker, those that run alone."""
    end = time.monotonic() + seconds
    rows: dict[str, dict[str, Any]] = {}
    together = [check for check in checks if not check.alone]
    alone = [check for check in checks if check.alone]
    shared = SHARED * seconds if alone else seconds
    try:
        for batch, until in ((together, end - seconds + shared), (alone, end)):
            waiting: queue.SimpleQueue[Check] = queue.SimpleQueue()
            for check in batch:
                waiting.put(check)

            def work(
                worker: Callable[[Check], dict[str, Any]],
                waiting: queue.SimpleQueue[Check] = waiting,
                until: float = until,
            ) -> None:
                with contextlib.suppress(queue.Empty):
                    while True:
                        check = waiting.get_nowait()
                        row = worker(check) if time.monotonic() < until else row_of(check, NOT_RUN)
                        rows[check.title] = row
                        report(row)

            threads = [threading.Thread(target=work, args=[worker]) for worker in workers[: len(batch)]]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            finish(workers[1:])
            workers = workers[:1]
    finally:
        finish(workers)
    return [rows[check.title] for check in checks]


def finish(workers: Iterable[Callable[[Check], dict[str, Any]]]) -> None:
    """End all processes: first each is told, then each is waited for."""
    processes = [worker for worker in workers if isinstance(worker, Worker)]
    for worker in processes:
        worker.release()
    for worker in processes:
        worker.close()


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


def page(where: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """gate.md: where it was, with the names that its numbers need, and the summary."""
    named = {name: f"{name} {value}" for name, value in where.items() if name != "device"}
    if "clocks" in where:
        named["clocks"] = clocks_in_words(where["clocks"])
    return f"{', '.join([where['device'], *named.values()])}\n\n{summary(rows)}\n"


def run(arguments: argparse.Namespace, out: pathlib.Path, seconds: float) -> str:
    """The gate's colour; its rows are in gate.jsonl."""
    suite = Suite(torch.device(arguments.device), arguments.quick)
    checks = [check for check in checks_of(suite) if selected(check, arguments)]
    jobs = arguments.jobs if arguments.jobs is not None else default_jobs(suite.device)
    where = {**environment(suite.device), "python": platform.python_version()}
    out.mkdir(parents=True, exist_ok=True)
    path, start, lock = out / "gate.jsonl", time.perf_counter(), threading.Lock()
    counts: collections.Counter[str] = collections.Counter()
    said = [start]  # when the last line of progress was printed

    with path.open("w") as file, tempfile.NamedTemporaryFile("r") as log:
        print(json.dumps(where), file=file, flush=True)

        def report(row: dict[str, Any]) -> None:
            with lock:
                print(json.dumps(row), file=file, flush=True)
                counts[row["status"]] += 1
                now = time.perf_counter()
                if row["status"] == RED or now - said[0] > PROGRESS_SECONDS:
                    said[0] = now
                    print(f"{now - start:5.0f} s  {counts.total()}/{len(checks)}, {counts[RED]} red  {row['status']}  "
                          f"{row['section']}/{row['check']}  {row.get('said', '')}", flush=True)  # fmt: skip

        Worker.server.set_forkserver_preload([__name__])
        workers = [Worker(serve, arguments.device, arguments.quick, log.name) for _ in range(jobs)]
        rows = run_checks(checks, workers or [perform], seconds, report)
        noise = log.read()
    result = colour(rows)
    text = summary(rows)
    print(text)
    (out / "gate.md").write_text(page(where, rows))
    if result == RED and noise:
        print("\nthe workers' last words:\n" + noise[-4000:])
    other = len(rows) - counts[GREEN] - counts[RED] - counts[NOT_RUN]
    print(f"\ncorrectness gate: {GREEN if result == GREEN else 'NOT GREEN'}, {counts[GREEN]} green, {counts[RED]} red, "
          f"{counts[NOT_RUN]} not run, {other} cannot run here, {len(rows)} checks in "
          f"{time.perf_counter() - start:.0f} s, {path}")  # fmt: skip
    return result


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a gate.jsonl, each with the fields of the first line, which says where all were made."""
    where, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return [{**where, **row} for row in rows]


def selected(check: Check, arguments: argparse.Namespace) -> bool:
    wanted = not arguments.only or any(text in check.title for text in arguments.only)
    section = not arguments.sections or check.section in arguments.sections
    return wanted and section and not any(text in check.title for text in arguments.skip)


def default_jobs(device: torch.device) -> int:
    """Processes for a GPU's first run, which is mostly compiling; 0, this process, for the interpreter."""
    if device.type != "cuda":
        return 0
    _, total = torch.cuda.mem_get_info(device)
    return max(1, min((os.cpu_count() or 1) - 1, total // BYTES_A_WORKER))
