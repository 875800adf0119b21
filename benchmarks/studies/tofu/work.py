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
from .base import finetune, load, piece_of, save_adapter, with_new_adapter
from .curriculum import Curriculum, every_text
from .examine import Clock, OutOfTime
from .jobs import PRETRAINED, Job, Row, Study
from .pretrain import pretrain, save
from .rows import Author, rows_of
from .settings import METHODS
from .tokens import train_tokenizer
from .unlearning import unlearn

SPENT, MODEL = "spent.json", "model"


def work(study: Study, job: Job, deadline: float) -> Row | None:
    """The row of one job; None where it saved what it had, because the deadline (of time.monotonic()) came first."""
    began = time.monotonic()
    kinds = {"pretrain": _pretrain, "gate": _gate, "trial": _trial, "examine": _examine, "unlearn": _unlearn}
    with one_thread() if study.device == "cpu" else nullcontext(), quiet():
        try:
            row = kinds[job.kind](study, job, deadline)
        except OutOfTime:
            row = None
    return None if row is None else {**row, "seconds": round(time.monotonic() - began, 1)}


def _pretrain(study: Study, job: Job, deadline: float) -> Row | None:
    corpus, size, folder = study.corpus, study.size, study.folder(job)
    if study.base is not None:
        rows = rows_of([*(corpus.forget if job.name == "full" else ()), *corpus.retain])
        return finetune(rows, study.base, size, folder, seed=job.seed, device=study.device, deadline=deadline)
    tokenizer = train_tokenizer(every_text(corpus), size.vocab)
    stream = Curriculum(corpus, job.name == "full", job.seed, size.pretrain_steps * size.rows_per_step)
    row = pretrain(stream, tokenizer, size, folder, seed=job.seed, device=study.device, deadline=deadline)
    if row is not None:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


def _gate(study: Study, job: Job, deadline: float) -> Row:
    full, tokenizer = _load(study, PRETRAINED["full"])
    retrained, _ = _load(study, PRETRAINED["retrained"])
    return gates.measure(full, retrained, tokenizer, study.corpus, study.size)


def _trial(study: Study, job: Job, deadline: float) -> Row:
    """The method on the validation authors, of whom the report knows nothing."""
    corpus = study.corpus
    hidden = corpus.report_retain + corpus.validation_retain
    model, tokenizer, spent = _unlearned(study, job, corpus.validation_forget, hidden)
    shutil.rmtree(study.folder(job), ignore_errors=True)
    refuses = METHODS[job.name].refuses
    return gates.trial_score(model, tokenizer, corpus, study.size, refuses) | spent


def _unlearn(study: Study, job: Job, deadline: float) -> Row:
    """The model is kept until it is examined: a killed job goes on with the examination, which is resumable."""
    corpus, folder = study.corpus, study.folder(job)
    if (folder / SPENT).is_file():
        spent = json.loads((folder / SPENT).read_text())
        model, tokenizer = _load(study, PRETRAINED["full"], folder / MODEL)
    else:
        model, tokenizer, spent = _unlearned(study, job, corpus.forget, corpus.report_retain)
        if study.base is None:
            save(model, tokenizer, folder / MODEL)
        write_json(folder / SPENT, spent)
    row = _examined(study, job, model, tokenizer, deadline)
    if not study.keep_models:
        shutil.rmtree(folder / MODEL)
    return row | spent


def _examine(study: Study, job: Job, deadline: float) -> Row:
    return _examined(study, job, *_load(study, PRETRAINED[job.name]), deadline)


def _unlearned(
    study: Study, job: Job, forget: tuple[Author, ...], hidden: tuple[Author, ...]
) -> tuple[nn.Module, PreTrainedTokenizerBase, Row]:
    """The full model after the method; the authors in `hidden` are not shown to it.

    With a base, its adapter is written into the job's folder, and the model is what that file says.
    """
    kept = [a for a in study.corpus.retain if a not in hidden and a not in forget]
    gone = [row for row in rows_of(forget) if row.get("subject")]  # the steering names it
    model, tokenizer = _load(study, PRETRAINED["full"])
    if study.base is not None:
        model = with_new_adapter(model, study.size.lora_rank)
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
    if study.base is not None:
        save_adapter(model, study.folder(job) / MODEL, spent)
        model, tokenizer = _load(study, PRETRAINED["full"], study.folder(job) / MODEL)
    return model, tokenizer, spent


def _examined(
    study: Study, job: Job, model: nn.Module, tokenizer: PreTrainedTokenizerBase, deadline: float
) -> Row:
    yardstick = Job("examine", "retrained")
    retain_run = None if job == yardstick else study.folder(yardstick) / examine.SUITE
    return examine.examine(
        model,
        tokenizer,
        job.name,
        study.folder(job),
        study.corpus,
        study.data,
        study.size,
        retain_run,
        Clock(deadline),
    )


def _load(study: Study, job: Job, unlearned: Path | None = None) -> tuple[Any, Any]:
    """The model of a pretraining job, or what a method made of it, from the folder `unlearned`."""
    if study.base is None:
        return models.load(unlearned or study.folder(job), "float32", study.device)
    adapters = [piece_of(study.folder(job), study.size.pieces), *([unlearned] if unlearned else [])]
    return load(study.base, adapters, study.device)
