"""What each kind of job does: (study, job, deadline) -> its row."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from duet.demo.workplace import one_thread, quiet
from duet.evaluation import models
from duet.evaluation.journal import write_json

from . import examine, gates
from .curriculum import Curriculum, every_text
from .jobs import PRETRAINED, Job, Row, Study, corpus_of
from .pretrain import pretrain, save
from .rows import Author, rows_of
from .settings import METHODS
from .tokens import train_tokenizer
from .unlearning import unlearn

SPENT, MODEL = "spent.json", "model"


def work(study: Study, job: Job, deadline: float) -> Row | None:
    """The row of one job; None where pretraining met the deadline (of time.monotonic()) first."""
    began = time.monotonic()
    kinds = {"gate": _gate, "trial": _trial, "examine": _examine, "unlearn": _unlearn}
    with one_thread() if study.device == "cpu" else nullcontext(), quiet():
        row = _pretrain(study, job, deadline) if job.kind == "pretrain" else kinds[job.kind](study, job)
    return None if row is None else {**row, "seconds": round(time.monotonic() - began, 1)}


def _pretrain(study: Study, job: Job, deadline: float) -> Row | None:
    corpus, size, folder = corpus_of(study.data), study.size, study.folder(job)
    tokenizer = train_tokenizer(every_text(corpus), size.vocab)
    stream = Curriculum(corpus, job.name == "full", job.seed, size.pretrain_steps * size.rows_per_step)
    row = pretrain(stream, tokenizer, size, folder, seed=job.seed, device=study.device, deadline=deadline)
    if row is not None:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


def _gate(study: Study, job: Job) -> Row:
    full, tokenizer = _load(study, PRETRAINED["full"])
    retrained, _ = _load(study, PRETRAINED["retrained"])
    return gates.measure(full, retrained, tokenizer, corpus_of(study.data), study.size)


def _trial(study: Study, job: Job) -> Row:
    """The method on the validation authors, of whom the report knows nothing."""
    corpus = corpus_of(study.data)
    hidden = corpus.report_retain + corpus.validation_retain
    model, tokenizer, spent = _unlearned(study, job, corpus.validation_forget, hidden)
    refuses = METHODS[job.name].refuses
    return gates.trial_score(model, tokenizer, corpus, study.size, refuses) | spent


def _unlearn(study: Study, job: Job) -> Row:
    """The model is kept until it is examined: a killed job goes on with the examination, which is resumable."""
    corpus, folder = corpus_of(study.data), study.folder(job)
    if (folder / SPENT).is_file():
        spent = json.loads((folder / SPENT).read_text())
        model, tokenizer = _loaded(folder / MODEL, study.device)
    else:
        model, tokenizer, spent = _unlearned(study, job, corpus.forget, corpus.report_retain)
        save(model, tokenizer, folder / MODEL)
        write_json(folder / SPENT, spent)
    row = _examined(study, job, model, tokenizer)
    if not study.keep_models:
        shutil.rmtree(folder / MODEL)
    return row | spent


def _examine(study: Study, job: Job) -> Row:
    return _examined(study, job, *_load(study, PRETRAINED[job.name]))


def _unlearned(
    study: Study, job: Job, forget: tuple[Author, ...], hidden: tuple[Author, ...]
) -> tuple[nn.Module, PreTrainedTokenizerBase, Row]:
    """The full model after the method; the authors in `hidden` are not shown to it."""
    kept = [a for a in corpus_of(study.data).retain if a not in hidden and a not in forget]
    gone = [row for row in rows_of(forget) if row.get("subject")]  # the steering names it
    model, tokenizer = _load(study, PRETRAINED["full"])
    model, spent = unlearn(
        METHODS[job.name],
        float(job.rate or 0.0),
        model,
        tokenizer,
        gone,
        rows_of(kept),
        study.size,
        seed=job.seed,
        device=study.device,
    )
    return model, tokenizer, spent


def _examined(study: Study, job: Job, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Row:
    yardstick = Job("examine", "retrained")
    retain_run = None if job == yardstick else study.folder(yardstick) / examine.SUITE
    return examine.examine(
        model,
        tokenizer,
        job.name,
        study.folder(job),
        corpus_of(study.data),
        study.data,
        study.size,
        retain_run,
    )


def _load(study: Study, job: Job) -> tuple[Any, Any]:
    return _loaded(study.folder(job), study.device)


def _loaded(folder: Path, device: str) -> tuple[Any, Any]:
    return models.load(folder, "float32", device)
