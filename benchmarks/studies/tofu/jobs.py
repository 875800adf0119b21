"""What the study does, in which order, and what of it was done before.

    pretrain full, retrained -> gate -> examine retrained, trials of learning rates -> examine full, unlearn by seed

A finished job is a line of results.jsonl; the line carries a hash of all that decides its numbers, and one with another
hash counts as not there. Models and unfinished work lie in `out`/work: a killed run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.studies import runner

from .base import base_digest
from .rows import Corpus, read_corpus
from .settings import GATES, METHODS, REFERENCES, Size

RESULTS, WORK, FAILURES = runner.RESULTS, "work", "failed.txt"
FIRST_GUESS = 60.0  # seconds of a job of a kind that was never done, for the budget
Row = dict[str, Any]


class Job(NamedTuple):
    """kind: pretrain, gate, trial, examine or unlearn; name: of a model or a method; rate: of a trial."""

    kind: str
    name: str
    seed: int = 0
    rate: float | None = None

    def __str__(self) -> str:
        return " ".join(
            [self.kind, self.name, *([f"{self.rate:g}"] if self.rate else []), f"seed {self.seed}"]
        )


@dataclass(frozen=True)
class Study:
    """All that decides what is done: where the data are, where results go, how large, on what, with whom, how often."""

    data: Path
    out: Path
    size: Size
    device: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    keep_models: bool = False
    base: Path | None = None
    split: str = "forget10"

    @property
    def corpus(self) -> Corpus:
        return corpus_of(self.data, self.split)

    def hash(self, job: Job) -> str:
        """Of all that decides a job's numbers, but for the code and the device."""
        size = asdict(self.size)
        decides: list[Any] = [list(job), self.corpus.digest]
        if self.base is not None:
            decides.append(digest_of(self.base))
        if job.kind == "pretrain":
            decides.append({name: size[name] for name in (_FINETUNES if self.base else _PRETRAINS)})
        else:
            decides.append(size)
        if job.name in METHODS:
            decides.append(asdict(METHODS[job.name]))
        return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()

    def folder(self, job: Job) -> Path:
        return self.out / WORK / f"{job.name}-{job.seed}-{self.hash(job)}"


_PRETRAINS = (
    "layers", "hidden", "heads", "feed_forward", "vocab", "pretrain_steps", "rows_per_step", "muon_rate", "adamw_rate",
)  # fmt: skip
_FINETUNES = ("pretrain_steps", "rows_per_step", "adamw_rate", "lora_rank", "pieces")
PRETRAINED = {name: Job("pretrain", name) for name in REFERENCES}
GATE = Job("gate", "gate")


@lru_cache(maxsize=1)
def corpus_of(data: Path, split: str = "forget10") -> Corpus:
    return read_corpus(data, split)


@lru_cache(maxsize=1)
def digest_of(base: Path) -> str:
    return base_digest(base)


# -- what was done ----------------------------------------------------------------------------------------------------


def read_results(study: Study) -> dict[Job, Row]:
    """Job -> its row, of the rows that were made under today's settings."""

    def job_of(row: Row) -> Job | None:
        job = Job(*row["job"])
        known = job.name in (*METHODS, *REFERENCES, GATE.name)
        return job if known and row["hash"] == study.hash(job) else None

    return runner.read_rows(study.out / RESULTS, job_of)


def failed_gates(row: Row) -> list[str]:
    """The gates that do not hold, as sentences."""
    return [
        f"{gate.number} is {row[gate.number]:.3f}, wanted {gate.wanted} ({gate.why})"
        for gate in GATES
        if not gate.holds(row[gate.number])
    ]


def trials(study: Study, method: str) -> list[Job]:
    return [Job("trial", method, 0, rate) for rate in METHODS[method].tried(study.size.rates_tried)]


def chosen_rate(study: Study, method: str, done: dict[Job, Row]) -> float | None:
    """The learning rate with the best score; None while trials are missing. A single one needs no trial."""
    tried = trials(study, method)
    if len(tried) == 1:
        return tried[0].rate
    if any(job not in done for job in tried):
        return None
    return max(tried, key=lambda job: done[job]["score"]).rate


def stages(study: Study, done: dict[Job, Row]) -> list[list[Job]]:
    """All jobs, stage by stage; those of a stage can run side by side. Seed by seed, so that a study stopped early has
    equally many seeds of each method."""
    tried = [
        job for method in study.methods if len(trials(study, method)) > 1 for job in trials(study, method)
    ]
    rates = {method: chosen_rate(study, method, done) for method in study.methods}
    return [
        list(PRETRAINED.values()),
        [GATE],
        [Job("examine", "retrained"), *tried],
        [
            Job("examine", "full"),
            *(Job("unlearn", m, seed, rates[m]) for seed in study.seeds for m in study.methods if rates[m]),
        ],
    ]


# -- doing it ---------------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a run of the study ended: `why` it did not go on (None: all is done), and what failed."""

    why: str | None
    failed: list[str]


def run(
    study: Study,
    *,
    workers: int = 0,
    budget_seconds: float = float("inf"),
    anyway: bool = False,
    only: str | None = None,
    do: Callable[[Study, Job, float], Row | None],
    say: Callable[[str], None] = print,
) -> Ended:
    """Do what is missing, stage by stage, and append a row to results.jsonl for each job that is done.

    Args:
        workers: processes beside each other; 0: in this one.
        budget_seconds: nothing is started that would not end in time if it took as long as the longest of its kind;
            pretraining and examinations save what they have and stop.
        anyway: go on although a gate does not hold.
        only: `pretrain` ends after the gate; `unlearn` pretrains nothing.
        do: (study, job, deadline) -> the job's row, with its `seconds`; None where it saved what it had, because the
            deadline (of time.monotonic()) came first. A function of a module: it is sent to the processes.
    """
    began = time.monotonic()
    deadline = began + budget_seconds
    study.out.mkdir(parents=True, exist_ok=True)
    (study.out / WORK).mkdir(exist_ok=True)
    (study.out / WORK / ".gitignore").write_text("*\n")
    made_with = runner.origin()
    failed: list[str] = []

    def keep(job: Job, row: Row) -> None:
        whole = {"job": list(job), **row, "hash": study.hash(job), "device": study.device, **made_with}
        runner.append_row(study.out / RESULTS, whole)
        say(f"{runner.minutes_since(began)}  {job}: {row['seconds']:.0f} s")

    def expected(job: Job) -> float:
        """As long as the longest of its kind; what stops in time by itself does not count."""
        if job.kind in ("pretrain", "examine"):
            return 0.0
        of_kind = [row for other, row in read_results(study).items() if other.kind == job.kind]
        key = "train_seconds" if job.kind == "unlearn" else "seconds"
        return max((row.get(key, row["seconds"]) for row in of_kind), default=FIRST_GUESS)

    with runner.processes(workers) as pool:
        for number in range(4):
            done = read_results(study)
            waiting = [job for job in stages(study, done)[number] if job not in done]
            if only == "unlearn" and number == 0 and waiting:
                return Ended("not pretrained yet: run without --only unlearn", failed)
            ended = runner.run_jobs(
                waiting,
                partial(_do, do, study, deadline),
                keep,
                pool=pool,
                workers=workers,
                deadline=deadline,
                expected=expected,
                failures=study.out / WORK / FAILURES,
            )
            failed += ended.failed
            if ended.late:
                return Ended(f"out of time; left: {', '.join(map(str, ended.late))} and what follows", failed)
            if failed and number < 2:
                return Ended("nothing can follow from a job that failed", failed)
            if number == 1:
                wrong = failed_gates(read_results(study)[GATE])
                for sentence in wrong:
                    say(f"not reached: {sentence}")
                if wrong and not anyway:
                    return Ended("not reached: nothing is unlearned (--anyway goes on)", failed)
                if only == "pretrain":
                    return Ended(None, failed)
    return Ended(None, failed)


def _do(do: Callable[[Study, Job, float], Row | None], study: Study, deadline: float, job: Job) -> Row | None:
    return do(study, job, deadline)


def check(methods: Sequence[str], base: Path | None = None) -> None:
    known = [name for name, method in METHODS.items() if base is None or method.by_adapter]
    for name in methods:
        if name not in known:
            raise ValueError(f"methods: wanted some of {', '.join(known)}, got {name!r}")
