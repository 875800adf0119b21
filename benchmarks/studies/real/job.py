"""One job: rows of a subject, a training, a measurement."""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel

from benchmarks.studies.runner import RESULTS, read_rows
from duet import OBJECTIVES, DuetConfig, DuetTrainer
from duet.evaluation.attacks.rows import read_attack_rows
from duet.evaluation.attacks.weights import round_weights
from duet.evaluation.elicit import elicit_facts
from duet.evaluation.facts import facts_of
from duet.evaluation.journal import MANIFEST
from duet.evaluation.models import load
from duet.model.shrinking import AdapterSize
from duet.run.shrink import shrink

from . import questions
from .arms import ARMS, LORA, options_of
from .measure import attack_options, measure, perplexity

Row = dict[str, Any]
ELICITED = "elicited"
SEEN = 12  # other subjects of the group whose questions are trained on; the rest is only asked about
SAMPLES, ANSWER_TOKENS, ELICIT_BATCH = 3, 40, 256


class Job(NamedTuple):
    """`arm`: of `ARMS`, or one of `UNTRAINED`."""

    subject: str
    arm: str
    seed: int = 0


def job_of(row: Row) -> Job:
    """The job that made a row of the results."""
    return Job(row["subject"], row["arm"], row["seed"])


def read_report(out: Path) -> list[Row]:
    """Of every job the newest row; of the base one for each Python, since its perplexity is that of Python's manual."""

    def key(row: Row) -> tuple[Job, str | None]:
        return job_of(row), row["python"] if row["arm"] == "base" else None

    return list(read_rows(out / RESULTS, key).values())


def elicit(model: str, out: Path, device: str | None, progress: Any) -> None:
    """What the base tells of every subject, into the folder `elicited`; continued where it was interrupted.

    Rows that came without their journal, as the repository's do, stay as they are; those of another base are refused.
    """
    if (out / ELICITED / "forget.jsonl").is_file() and not (out / ELICITED / MANIFEST).is_file():
        return
    loaded, tokenizer = load(model, "float32", device)
    everybody = [subject for group in questions.GROUPS.values() for subject in group]
    facts = facts_of(questions.rows(), everybody)
    elicit_facts(
        loaded, tokenizer, facts, out / ELICITED, samples=SAMPLES, max_new_tokens=ANSWER_TOKENS, batch_size=ELICIT_BATCH, name="base",
        progress=progress,
    )  # fmt: skip


def read(out: Path, split: str, kind: str) -> list[Row]:
    folder = out / ELICITED / ("" if split == "train" else split)
    path = folder / f"{kind}.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    )


def seen_neighbours(subject: str) -> list[str]:
    """The other subjects of the group that training asks about; which ones depends on the subject alone."""
    group = [name for name in questions.GROUPS[questions.group_of(subject)] if name != subject]
    return random.Random(subject).sample(group, SEEN)


def rows_of(out: Path, subject: str, split: str) -> dict[str, list[Row]]:
    """What the base tells: `forget`, `seen` and `unseen` (other subjects of the group), `general`."""
    about = read(out, split, "forget")
    seen = seen_neighbours(subject)
    others = set(questions.GROUPS[questions.group_of(subject)]) - {subject, *seen}
    return {
        "forget": [row for row in about if row["subject"] == subject],
        "seen": [row for row in about if row["subject"] in seen],
        "unseen": [row for row in about if row["subject"] in others],
        "general": read(out, split, "retain"),
    }


def run_job(
    job: Job,
    *,
    model: str,
    out: Path,
    device: str | None = None,
    split: str = "report",
    changed: Row | None = None,
) -> Row:
    """The row of a job.

    Args:
        model: folder of the base.
        out: of the study, with what the base tells.
        device: None: the GPU if there is one.
        split: whose wordings are asked afterwards.
        changed: other options than the arm's.
    """
    torch.manual_seed(job.seed)
    asked = rows_of(out, job.subject, split)
    base, tokenizer = load(model, "float32", device)
    own = {"base_perplexity": perplexity(base, tokenizer)}
    began, size = time.monotonic(), {}
    if job.arm == "int8":
        round_weights(base, 8)
    elif job.arm != "base":
        options = options_of(job.arm, questions.group_of(job.subject), changed)
        student = train(
            base, tokenizer, rows_of(out, job.subject, "train"), options, seed=job.seed, device=device
        )
        if ARMS[job.arm].shrinks:
            size = {"size": shrink_adapter(student, tokenizer, rows_of(out, job.subject, "validation"))}
        elif ARMS[job.arm].size != 1:
            AdapterSize(student).set(ARMS[job.arm].size)
        base = student.merge_and_unload() if isinstance(student, PeftModel) else student
    trained = time.monotonic()
    found = own | measure(base, tokenizer, asked, seed=job.seed)
    return {
        **job._asdict(),
        "changed": changed or {},
        **size,
        **{key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()},
        "rows": {kind: len(of) for kind, of in asked.items()},
        "train_seconds": round(trained - began, 1),
        "seconds": round(time.monotonic() - began, 1),
        "device": str(base.device.type),
    }


def run_tried(tried: tuple[Job, Row], **how: Any) -> Row:
    """The row of a job and the options that it changes. It is here, and not beside the command, so that other processes find it."""
    job, changed = tried
    return run_job(job, changed=changed, **how)


def train(
    base: Any,
    tokenizer: Any,
    rows: dict[str, list[Row]],
    options: Row,
    *,
    seed: int = 0,
    device: str | None = None,
    bar: bool = False,
) -> Any:
    """The base after a training, with its adapter beside the weights; a method that picks weights to train gets no adapter.

    Args:
        rows: of `rows_of`, of the split `train`.
        options: of DuetConfig.
        bar: whether progress is shown.
    """
    retain = [*rows["seen"], *rows["general"]]
    adapter = None if OBJECTIVES[options["objective"]].trains else LoraConfig(**LORA)
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": not bar}
    with tempfile.TemporaryDirectory(prefix="duet-real-") as folder:
        args = DuetConfig(output_dir=folder, seed=seed, use_cpu=device == "cpu", **quiet, **options)
        trainer = DuetTrainer(base, args, rows["forget"], retain, tokenizer, peft_config=adapter)
        trainer.train()
        student: Any = trainer.accelerator.unwrap_model(trainer.model)
        return student.eval()


def shrink_adapter(student: Any, tokenizer: Any, rows: dict[str, list[Row]]) -> float:
    """The size at which `duet shrink` leaves the adapter of a trained model.

    Args:
        rows: in wordings that neither training nor report reads. Neighbours that training never named are not asked.
    """
    forget, retain = (
        read_attack_rows(of, "rows") for of in (rows["forget"], [*rows["seen"], *rows["general"]])
    )
    adapter = AdapterSize(student)
    size = shrink(adapter, tokenizer, forget, retain, options=attack_options(0)).best.size
    adapter.set(size)
    return size
