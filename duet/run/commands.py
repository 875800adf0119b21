"""`duet train`, `duet cache` and `duet merge`: from a RunConfig to a saved model.

load model and rows -> DuetTrainer -> train (or resume) -> save model, tokenizer, model card, merged weights
"""

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..data.prompts import Prompting
from ..data.sources import load_rows
from ..folders import write_named, written
from ..model.adapters import (
    ADAPTER,
    DTYPES,
    MUCH_LOST,
    UNREADABLE,
    base_of,
    check_same_logits,
    holds_adapter,
    holds_weights,
    load_adapted,
    logits_of,
    lost_in_rounding,
    merge_adapters,
    record_at,
    trained_dtype,
)
from ..model.answers import tokenizer_at
from ..model.lm import base_language_model
from ..model.loading import choose_attention, is_sharded, load_model, loading_device
from ..names import check_one_of, expanded
from ..output.card import copy_card
from ..output.checkpoints import (
    check_output_dir,
    damaged_checkpoint,
    last_finished_checkpoint,
    resumed_checkpoint,
)
from ..output.record import refused_by_all
from ..store.build import Cached, cache_teacher
from ..trainer import DuetTrainer
from .config_file import ModelSection, RunConfig

logger = logging.get_logger(__name__)
MERGED = "merged"  # folder in that of a run: the model with its adapter merged
_WEIGHTS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)  # as `save_pretrained` calls the files


def train(
    run: RunConfig, resume: bool = False, before: Callable[[DuetTrainer], object] = lambda trainer: None
) -> DuetTrainer:
    """Trains and saves; returns the trainer. No other process can write to `output_dir` meanwhile.

    Args:
        run: what to do.
        resume: go on from the last finished checkpoint in `output_dir`; from the start where there is neither one nor a model.
        before: called with the trainer before a run makes its first step; not where it is resumed.

    Raises:
        TypeError, ValueError, OSError: naming the key, what came and what was wanted.
    """
    check_output_dir(str(run.training.output_dir))
    with _written(run.training, str(run.training.output_dir), "training.output_dir"):
        return _train(run, resume, before)


def _train(run: RunConfig, resume: bool, before: Callable[[DuetTrainer], object]) -> DuetTrainer:
    folder, checkpoint = str(run.training.output_dir), run.training.resume_from_checkpoint
    last = last_finished_checkpoint(folder)
    if last and not (resume or checkpoint):
        raise FileExistsError(
            f"training.output_dir: {folder!r} holds {last!r} of an earlier run, which a later --resume "
            "could take for this one's; wanted --resume, or a folder without checkpoints"
        )
    if not last and not resume and (cut := damaged_checkpoint(folder)):
        raise FileExistsError(
            f"training.output_dir: {folder!r} holds {os.fspath(cut)!r} of an earlier run, which is damaged; wanted another folder, or "
            "--resume, which passes it over"
        )
    if run.merge:  # what would stand in the way after the training
        wanted = "another training.output_dir"
        _check_free(Path(folder, MERGED), run.model.name, bool(resume or checkpoint), "merge", wanted)
    if not last and (holds_weights(folder) or holds_adapter(folder)):
        without = ", but no finished checkpoint to resume from" if resume else ""
        raise FileExistsError(
            f"training.output_dir: {folder!r} holds the model of an earlier run{without}, which would be overwritten; wanted another folder"
        )
    if checkpoint is None and resume:
        checkpoint = last
        logger.warning(
            f"resuming from {checkpoint}" if checkpoint else "nothing to resume: starting at step 0"
        )
    resumed_checkpoint(checkpoint, folder)  # refuses before the model is loaded
    trainer = make_trainer(run)
    if not checkpoint:
        before(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    try:  # whatever ends the last evaluation, the trained model and what is known of it are there
        if run.eval:
            trainer.save_metrics("eval", trainer.evaluate())
    finally:
        trainer.save_state()
        trainer.create_model_card()
    if run.merge and trainer.is_world_process_zero():
        # A quantised model has another base than the merged; a forward of a sharded one would wait for the other processes.
        alone = run.model.quantization is None and not is_sharded(run.training)
        trained = trainer.accelerator.unwrap_model(trainer.model) if alone else None
        # One of an earlier part of the run, from before a resume, is replaced.
        merge_adapter(folder, Path(folder, MERGED), trained=trained, replaces=True)
    return trainer


@contextmanager
def _written(args: Any, folder: str, argument: str) -> Iterator[None]:
    """`written` by the first of the processes that a launcher started; what it refuses all refuse."""
    with ExitStack() as until_the_end:
        with refused_by_all():
            if args.process_index == 0:
                until_the_end.enter_context(written(folder, argument))
        yield


def how_to_go_on(folder: str) -> str:
    """What an interrupted training left in its `output_dir`."""
    if last := last_finished_checkpoint(folder):
        return f"interrupted; {last} is finished, and the same command with --resume goes on from it"
    return (
        f"interrupted; there is no finished checkpoint in {folder} yet (save_steps says when one is written)"
    )


def _check_free(out: str | os.PathLike, base: str, replaces: bool, name: str, wanted: str) -> None:
    """Refuses a folder in which a merged model would meet its base, an adapter or, unless it `replaces` that, a model."""
    if Path(out).is_file():
        raise NotADirectoryError(f"out: wanted a folder, but {os.fspath(out)!r} is a file")
    if Path(base).resolve() == Path(out).resolve():
        raise ValueError(
            f"out: {os.fspath(out)!r} is the base of the adapter, on which it is loaded; wanted another folder"
        )
    adapter, weights = holds_adapter(out), holds_weights(out)
    if adapter or ((weights or Path(out, "config.json").is_file()) and not replaces):
        of_a_model = "a model already" if weights else "the config.json of another model"
        there = "an adapter, which would be applied once more" if adapter else of_a_model
        raise ValueError(f"{name}: {os.fspath(out)!r} holds {there}; wanted {wanted}")


def cache(run: RunConfig, dtype: str = "float32") -> Cached:
    """Writes the teacher's targets for a run to `training.teacher_store`, to which no other process can write meanwhile.

    Args:
        run: the one that `train` will get, with `teacher_store` set.
        dtype: in which logits are stored.

    Raises:
        TypeError, ValueError, OSError: naming the key, what came and what was wanted.
    """
    args = run.training
    if not args.teacher_store:
        raise ValueError("training.teacher_store: wanted the folder to write, got nothing")
    store = expanded("training.teacher_store", args.teacher_store)
    with _written(args, store, "training.teacher_store"):
        forget, retain, evals = _rows(run)
        tokenizer = load_tokenizer(run.model)
        return cache_teacher(load_asked(run), args, forget, retain, tokenizer, evals, dtype=dtype)


def training_rows(run: RunConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to forget and those to retain, which may be none."""
    forget = load_rows(run.forget, "data.forget")
    return forget, [] if run.retain is None else load_rows(run.retain, "data.retain")


def _rows(run: RunConfig) -> tuple[Any, Any, Any]:
    forget, retain = training_rows(run)
    evals = {name: load_rows(source, f"data.eval.{name}") for name, source in run.eval.items()}
    return forget, retain or None, evals or None


def make_trainer(run: RunConfig) -> DuetTrainer:
    """The DuetTrainer of a run; rows are read before the model is loaded."""
    forget, retain, evals = _rows(run)
    args = run.training
    lora = None if run.adapter is None else _lora({"revision": run.model.revision} | run.adapter)
    kwargs = model_kwargs(run.model, args)
    model = load_named(run, "model", kwargs)
    live = run.teacher is not None and not args.teacher_store
    return DuetTrainer(
        model=model,
        args=args,
        forget_dataset=forget,
        retain_dataset=retain,
        eval_dataset=evals,
        processing_class=load_tokenizer(run.model),
        teacher_model=load_named(run, "teacher", kwargs) if live else None,
        peft_config=lora,
    )


def load_named(run: RunConfig, key: Literal["model", "teacher"], kwargs: dict[str, Any]) -> nn.Module:
    """The model of `model:`, before this run, or the other one of `teacher:`, loaded as the model is, in its newest revision."""
    device = loading_device(run.training)
    if key == "teacher":
        return load_model(run.teacher, key, kwargs | {"revision": None}, device)
    return load_model(run.model.name, key, kwargs, device, run.training.earlier_adapter)


def load_asked(run: RunConfig) -> nn.Module:
    """The model that is steered, where nothing is trained: the other model of `teacher:`, else that of `model:`."""
    kwargs = model_kwargs(run.model, run.training)
    return load_named(run, "teacher" if run.teacher else "model", kwargs)


def model_kwargs(section: ModelSection, args: Any) -> dict[str, Any]:
    """The arguments of `from_pretrained`; those of `model_init_kwargs` override the others."""
    kwargs: dict[str, Any] = {"dtype": section.dtype, "revision": section.revision}
    half = section.dtype in ("bfloat16", "float16") or args.bf16 or args.fp16
    name, reason = choose_attention(section.attn_implementation, args.device, half)
    logger.info(f"attn_implementation={name or 'as transformers chooses'!r}: {reason}")
    if name is not None:
        kwargs["attn_implementation"] = name
    if section.quantization is not None:
        kwargs["quantization_config"] = _quantization(section)
        kwargs["device_map"] = {"": args.device}
    return kwargs | (args.model_init_kwargs or {})


def _quantization(section: ModelSection) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model.quantization: {section.quantization!r} needs bitsandbytes, which is not installed "
            "(pip install 'duet-kernels[quant]')"
        )
    from transformers import BitsAndBytesConfig

    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if section.dtype == "auto" else getattr(torch, section.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _lora(options: dict[str, Any]) -> Any:
    from peft import LoraConfig

    try:
        return LoraConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter: {error}") from error


def load_tokenizer(section: ModelSection) -> Any:
    revision = None if section.tokenizer else section.revision
    return tokenizer_at("model.tokenizer", section.tokenizer or section.name, revision=revision)


def merge_adapter(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    dtype: str = "auto",
    trained: nn.Module | None = None,
    replaces: bool = False,
) -> nn.Module:
    """Adds a saved adapter to its base model and saves the sum, which then needs no peft, with the card and the record of the run.

        W + (alpha / r) B A

    The base is loaded without quantisation, even if training used it: adding to 4-bit weights would round the adapter to
    0. Runs on the CPU, in the memory of one copy of the base. The logits are compared at every step: with the adapter,
    merged, saved and read again.

    Args:
        folder: where the adapter is (`adapter_config.json` names its base).
        out: where the model and its tokenizer go; not a folder with an adapter, which would be applied to it a second time, nor one
            to which another process is writing.
        dtype: of the saved model: `float32`, `bfloat16`, `float16`; `auto`: that in which the adapter was trained, by the record
            of its run, else the base checkpoint's. 16 bits may round much of the adapter away.
        trained: the model whose adapter was saved in `folder`; None: not compared with it.
        replaces: whether a model in `out` is replaced.

    Returns:
        the merged model, read from `out`.

    Raises:
        FileNotFoundError: there is no adapter in `folder`, or its base cannot be loaded.
        ValueError: `out` holds an adapter or a model, or another process is writing to it; more than half of what the adapter
            changes would be rounded away; or a step changes the model.
        OSError: `out` cannot be written.
    """
    check_one_of("dtype", dtype, DTYPES)
    if not holds_adapter(folder):
        raise FileNotFoundError(f"{folder}: wanted a folder with an adapter, found no {ADAPTER}")
    dtype = trained_dtype(folder) if dtype == "auto" else dtype
    with _naming(folder):
        base = os.fspath(base_of(folder))
    free = base, replaces, "out", f"a new folder, such as {os.path.join(out, MERGED)!r}"
    _check_free(out, *free)
    with written(out, "out"):
        _check_free(out, *free)  # now that nobody else writes to it
        return _merge(folder, Path(out), base, dtype, trained, refuse=not replaces)


def _merge(
    folder: str | os.PathLike, out: Path, base: str, dtype: str, trained: nn.Module | None, refuse: bool
) -> nn.Module:
    tokenizer = tokenizer_at("adapter", folder, base)
    with _naming(folder):
        model: Any = load_adapted(folder, dtype=dtype, device_map="cpu")
    wanted = logits_of(model)
    if trained is not None:
        dtypes = (base_language_model(each).dtype for each in (model, trained))
        coarsest = max(dtypes, key=lambda kind: torch.finfo(kind).eps)
        check_same_logits(trained, wanted, f"{folder}: saving and loading its adapter", coarsest)
    whole = base_language_model(model).dtype.itemsize > 2
    lost = lost_in_rounding(model, torch.bfloat16) if whole else 0.0  # else the merge itself says it
    model = merge_adapters(model, str(folder), refuse)
    if lost > MUCH_LOST[0]:
        logger.warning(
            f"{out}: whoever loads it in bfloat16 rounds {100 * lost:.0f} % of what its adapter changes away; load it in the float32 "
            "in which it is saved, and attack it as it will be loaded (`duet attack --dtype`)"
        )
    with _written_beside(out) as new:
        with write_named(out, "out"):
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            Prompting.of(folder).save(new)
            copy_card(folder, new)
            if record := record_at(folder):
                shutil.copyfile(record, new / record.name)
        model = None  # one copy at a time
        model = AutoModelForCausalLM.from_pretrained(new, device_map="cpu", trust_remote_code=False)
        check_same_logits(model, wanted, f"{out}: saving and loading the merged model")
    model.name_or_path = model.config._name_or_path = os.fspath(out)
    return model


@contextmanager
def _written_beside(out: Path) -> Iterator[Path]:
    """A folder for a model, whose files go to `out` at the end: a model that is not whole, or was refused, never lies there."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        new = Path(beside, "model")
        yield new
        for path in out.glob("model*.safetensors*"):  # there may have been more files than now
            if _WEIGHTS.fullmatch(path.name):
                path.unlink()
        shutil.copytree(new, out, dirs_exist_ok=True, copy_function=os.replace)


@contextmanager
def _naming(folder: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise FileNotFoundError(
            f"{folder}: its adapter or the base of it could not be loaded: {error}"
        ) from error
