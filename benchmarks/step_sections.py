"""Whole runs of DuetTrainer on a random-weight model of a real size, each with its time and memory by phase.

A section is one way to train: which positions, with or without checkpointing, who teaches, how the weights are kept. It runs a few
steps through `DuetTrainer.train()`; a row of JSON is written as soon as it is known. There is a time for all: a section that is not
likely to fit is not begun, one that takes too long is ended, and what was measured until then is kept. Last, where time is left,
`duet plan` says what it would have said to each of them.

Nothing here is on the user's path but the model: its weights are random and made on the device, and 4-bit weights are made from
them in place, where a user's come from a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import pathlib
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any, TextIO

import torch
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from benchmarks.harness import why
from benchmarks.step_model import LORA, Words, adapter, config_of, new_model, words_of
from benchmarks.step_phases import Phases, Watch, bytes_of
from benchmarks.step_report import Shape
from duet import DuetConfig, DuetTrainer
from duet.config import CHECKPOINTING
from duet.model.weights import weights_hash
from duet.run.plan import Planner, Settings
from duet.store.build import cache_teacher

GIB = 2**30
WARM = 2


@dataclasses.dataclass(frozen=True)
class Section:
    """One way to train.

    Attributes:
        name: as it stands in the row.
        positions: `first` (a query of prompt + answer tokens) or `answer`.
        checkpointing: whether activations are recomputed.
        cached: whether the teacher's targets come from a store.
        batches: the shape's batch, so many times.
        nf4: whether the base has 4-bit weights.
        cap_gib: more than this the allocator may not take.
        goal_gib: what the peak is to stay below.
        seconds: what it takes on an H200, roughly; it is not begun with less left.
    """

    name: str
    positions: str
    checkpointing: bool
    cached: bool = False
    batches: int = 1
    nf4: bool = False
    cap_gib: float | None = None
    goal_gib: float | None = None
    seconds: float = 10


SECTIONS = {
    "8b": (
        Section("first position, checkpointing, live teacher", "first", True, goal_gib=22, seconds=12),
        Section(
            "the same, twice the batch under 23 GiB",
            "first",
            True,
            batches=2,
            cap_gib=23,
            goal_gib=23,
            seconds=14,
        ),
        Section("first position, no checkpointing, live teacher", "first", False, seconds=8),
        Section("answers, checkpointing, live teacher", "answer", True, goal_gib=22),
        Section(
            "answers, checkpointing, cached teacher", "answer", True, cached=True, goal_gib=22, seconds=12
        ),
        Section(
            "NF4, first position, checkpointing, cached teacher",
            "first",
            True,
            cached=True,
            nf4=True,
            goal_gib=12,
            seconds=18,
        ),
    ),
    "1b": (
        Section("answers, no checkpointing, live teacher", "answer", False),
        Section("answers, no checkpointing, cached teacher", "answer", False, cached=True),
    ),
}


class OutOfTime(BaseException):
    """A section took longer than what was left; as an interrupt, it passes by whoever catches every Exception."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the main thread when the time is over."""

    def ring(*_: Any) -> None:
        raise OutOfTime("the time was over")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-3), 1e7))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclasses.dataclass
class Bench:
    """One shape's sections, one after the other.

    Args:
        where: fields of every row.
        deadline: of `time.monotonic()`.
        out: where rows go as they come; None: nowhere.
    """

    name: str
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    steps: int
    where: dict[str, str]
    deadline: float
    out: TextIO | None = None

    def __post_init__(self) -> None:
        self.cuda = self.device.type == "cuda"
        self.tokenizer = words_of(self.shape)
        self.rows: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, sections: tuple[Section, ...]) -> list[dict[str, Any]]:
        """The rows of all sections that fitted in the time."""
        with tempfile.TemporaryDirectory() as folder:
            self.folder = pathlib.Path(folder)
            model: PreTrainedModel | None = None
            for section in sections:
                row = self.about(section)
                if self.left < (section.seconds if self.cuda else 0):
                    self.add(
                        row
                        | {
                            "status": f"not begun: {self.left:.0f} s were left, it takes {section.seconds:.0f}"
                        }
                    )
                    continue
                try:
                    with within(self.left):
                        if model is None or section.nf4:
                            del model
                            model = self.made(section.nf4)
                        measured, model = self.measured(section, model)
                        row |= measured
                except (Exception, OutOfTime) as error:  # what went wrong is what was found out
                    row["status"] = f"ended: {error}" if isinstance(error, OutOfTime) else why(error)
                    model = None  # whatever state it is in
                    self._clean()
                self.add(row)
            del model
        self._clean()
        self.plan(sections)
        return self.rows

    def about(self, section: Section) -> dict[str, Any]:
        told = {
            name: getattr(section, name)
            for name in ("positions", "checkpointing", "cached", "nf4", "goal_gib")
        }
        row = {
            **self.where,
            "op": "training_step_phases",
            "shape": self.name,
            "section": section.name,
            **told,
        }
        batch = self.shape.batch * section.batches
        return row | {"batch": batch, "dtype": str(self.dtype).removeprefix("torch."), "status": "ok"}

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.out is not None:
            self.out.write(json.dumps(row) + "\n")
            self.out.flush()

    # -- one section -------------------------------------------------------------------------------------------------

    def made(self, nf4: bool) -> PreTrainedModel:
        model = new_model(self.shape, self.dtype, self.device)
        return quantised(model, self.device) if nf4 else model

    def measured(self, section: Section, model: PreTrainedModel) -> tuple[dict[str, Any], PreTrainedModel]:
        """(fields of a row, the model without its adapter)."""
        model.gradient_checkpointing_disable()  # an earlier section may have turned it on; a trainer turns it on only
        weights = bytes_of(model.state_dict().values())
        store = self.stored(section, model) if section.cached else None
        start = time.perf_counter()
        weights_hash(model)
        hashed = time.perf_counter() - start
        with self._capped(section.cap_gib):
            self._clean()
            start = time.perf_counter()
            trainer = DuetTrainer(
                model,
                self.config(section, WARM + self.steps),
                *self.data(section),
                processing_class=self.tokenizer,
                peft_config=adapter(),
                teacher_store=store,
            )
            made = time.perf_counter() - start
            trainer.remove_callback(PrinterCallback)
            watch = Watch(trainer)
            trainer.train()
            found = self.found(trainer, watch.phases(self.steps), weights)
            watch.detach()
        model = trainer.model.unload()
        model.requires_grad_(False)
        return found | {"hash_s": round(hashed, 3), "trainer_s": round(made, 3)}, model

    def found(self, trainer: DuetTrainer, phases: Phases, weights: int) -> dict[str, Any]:
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        states = [t for state in trainer.optimizer.state.values() for t in state.values()]
        sizes = {"weights": weights, "adapter": bytes_of(trained), "optimizer": bytes_of(states)}
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            sizes |= {
                "standing": phases.standing,
                "teacher's forward": phases.above("teacher forward", "top-k"),
                "activations": max(0, phases.after.get("student forward", 0) - phases.standing),
                "loss": phases.above("loss", "loss backward"),
                "backward": phases.above("backward"),
                "peak": max(phases.peak.values()),
                "reserved": torch.cuda.memory_reserved(),
                "card": total - free,
            }
        return {
            "ms": {name: round(ms, 3) for name, ms in phases.ms.items()},
            "step_ms": round(phases.step_ms, 3),
            "host_ms": round(phases.host_ms, 3),
            "gib": {name: round(size / GIB, 6) for name, size in sizes.items()},
            "loss_share": phases.loss_share,
            "student_tokens": phases.student_tokens,
            "teacher_tokens": phases.teacher_tokens,
            "n": phases.n,
            "rounds": phases.steps,
        }

    def config(self, section: Section, steps: int) -> DuetConfig:
        prefix = Words(self.shape, seed=3)(self.shape.prefix - 1) + " {subject}"
        batch = self.shape.batch * section.batches
        return DuetConfig(
            output_dir=str(self.folder / "out"),
            objective="duet",
            k=self.shape.k,
            positions=section.positions,
            answer_source="dataset",
            steering_prefixes=[prefix],
            retain_subjects="fixed",
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            learning_rate=1e-4,
            max_steps=steps,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=self.cuda,
            use_cpu=not self.cuda,
            **{CHECKPOINTING: section.checkpointing},
        )

    def data(self, section: Section) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Forget and retain rows; where the first position is scored, the whole query is prompt."""
        shape, answered = self.shape, section.positions == "answer"

        def rows(seed: int) -> list[dict[str, str]]:
            text = Words(shape, seed)
            prompt = shape.prompt if answered else shape.prompt + shape.answer
            made = [{"prompt": text(prompt), "subject": "w7"} for _ in range(shape.batch * section.batches)]
            return [row | ({"answer": text(shape.answer - 1)} if answered else {}) for row in made]

        return rows(4), rows(5)

    def stored(self, section: Section, model: PreTrainedModel) -> Any:
        folder = self.folder / f"store {section.name}"
        return cache_teacher(
            model, self.config(section, 1), *self.data(section), self.tokenizer, folder=folder
        ).store

    # -- what a plan says --------------------------------------------------------------------------------------------

    def plan(self, sections: tuple[Section, ...]) -> None:
        """A row for each section that was measured, as long as there is time."""
        planner = Planner(config_of(self.shape))
        measured = {row["section"] for row in self.rows if row["status"] == "ok"}
        for section in sections:
            if section.name not in measured:
                continue
            if self.left <= 0:
                return
            try:
                with within(self.left):
                    budget = planner.budget(self.settings(section))
            except OutOfTime:
                return
            sizes = {
                "weights": budget.weights,
                "adapter": budget.adapter,
                "optimizer": budget.optimizer,
                "standing": budget.standing,
                "teacher's forward": budget.teacher_forward,
                "activations": budget.activations,
                "loss": budget.activations + budget.loss,
                "backward": budget.backward,
                "peak": budget.peak,
            }
            gib = {name: round(size / GIB, 6) for name, size in sizes.items()}
            self.add(self.about(section) | {"op": "training_step_plan", "gib": gib})

    def settings(self, section: Section) -> Settings:
        shape, answered = self.shape, section.positions == "answer"
        length = shape.prompt + shape.answer - (1 if answered else 0)
        return Settings(
            batch=shape.batch * section.batches,
            length=length,
            teacher_length=length + shape.prefix,
            scored=shape.answer if answered else 1,
            dtype=self.dtype,
            autocast=self.cuda,
            adapter=LORA,
            quantization="nf4" if section.nf4 else None,
            checkpointing=section.checkpointing,
            teacher="cache" if section.cached else "adapter off",
        )

    # -- the device --------------------------------------------------------------------------------------------------

    def _clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def _capped(self, gib: float | None) -> Iterator[None]:
        """Within the context the allocator takes no more than this, as on a smaller card."""
        if gib is None or not self.cuda:
            yield
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def quantised(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """In place, as bitsandbytes does it for `from_pretrained`: every linear layer but the head in NF4, with its scales quantised too."""
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is torch.nn.Linear and layer is not head
    ]
    for parent, name, layer in layers:
        small = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=layer.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=small
        )
        small.weight = weight.to(device)
        layer.weight = None  # its memory is free again
        setattr(parent, name, small)
    model.is_loaded_in_4bit = True
    return model
