"""A whole training step, live teacher against cached teacher against TRL's SDFT: `python -m benchmarks.training_step`.

One random-weight Llama, one batch, LoRA on all its linear layers (so the LM head is frozen), AdamW; answers are given, so
that nobody generates. A step is: make the batch (a cached teacher reads its store, SDFT tokenises), forward, loss,
backward, optimizer. With F a forward of the student's tokens, r = teacher's / student's tokens, H the top-k of the teacher's
logits where the answer is predicted, S a step of the student alone in a plain loop, its targets in memory:

    ideal speed-up of cached over live    1 + r F / S        (and, counting the teacher's head, 1 + (r F + H) / S)
    loss's share of a step                time of the loss's forward and backward / the step

The loss is timed by itself on the step's own hidden states and targets: what autograd runs between the loss and the
hidden states is exactly that (with a live teacher its top-k counts too; SDFT's two heads count as its loss). The share by
difference, S with and without the loss (a mean of squares of the hidden states in its place), stands beside it; it is the
difference of two large numbers. Everything runs in turn, in one process.

First the gate: live, cached and plain loop must give the loss of the definition (full logits); else no time is printed.
Memory is what a step adds to weights and optimizer states. Writes results/<device or cpu>/training_step.jsonl and .md.

The shapes 8b and 1b are also trained as a user would, and each step is taken apart: `benchmarks.step_sections`, whose rows come as
they are known, in training_step_<shape>.jsonl and .md. With --seconds it ends by itself. 8b has no variants side by side.
Knows the trainer, as no other benchmark does: it is what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from benchmarks.gpu.__main__ import results_folder
from benchmarks.harness import Call, Measured, environment, measure, version, why
from benchmarks.step_model import adapter, data_of, new_model, words_of
from benchmarks.step_report import Run, Shape, goal_met, phases_text, rows_of, runs_of, table_of
from benchmarks.step_sections import SECTIONS, Bench, OutOfTime, within
from duet import DuetConfig, DuetTrainer
from duet.config import CHECKPOINTING
from duet.data.dataset import Draw
from duet.store.build import cache_teacher
from duet_kernels import LMHead, TopK, linear_topk, topk_distill_loss

LEARNING_RATE = 1e-4
SHAPES = {
    "small": Shape(4, 512, 1376, 8, 8, v=32000, batch=8, prompt=48, prefix=64, answer=64),
    # Two of the sixteen layers of "1b": what a CPU can do in the time.
    "wide": Shape(2, 2048, 8192, 32, 8, 128256, 2, 32, 64, answer=224, tied=True, compared=False),
    "1b": Shape(16, 2048, 8192, 32, 8, 128256, batch=16, prompt=64, prefix=64, answer=256, tied=True),
    # Its sections alone: models of this size do not stand side by side.
    "8b": Shape(32, 4096, 14336, 32, 8, 128256, batch=8, prompt=256, prefix=128, answer=256),
}
ALONE = ("8b",)


# --- the steps --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """What all variants share."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    folder: pathlib.Path

    def __post_init__(self) -> None:
        self.tokenizer = words_of(self.shape)
        self.rows, self.prefix = data_of(self.shape)

    def model(self) -> PreTrainedModel:
        return new_model(self.shape, self.dtype, self.device)

    def options(self) -> dict[str, object]:
        """Of every trainer."""
        return {
            "output_dir": str(self.folder / "out"),
            "per_device_train_batch_size": self.shape.batch,
            "learning_rate": LEARNING_RATE,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "bf16": False,  # the weights' own dtype, no autocast
            "use_cpu": self.device.type == "cpu",
        }

    def config(self) -> DuetConfig:
        return DuetConfig(
            **self.options(),
            objective="duet_forward_kl",
            k=self.shape.k,
            positions="answer",
            answer_source="dataset",
            steering_prefixes=[self.prefix],
            retain_subjects="fixed",
            per_device_eval_batch_size=self.shape.batch,
        )


def duet_trainer(job: Job, cached: bool) -> tuple[DuetTrainer, Callable[[], dict[str, Tensor]]]:
    """The trainer, and what makes its batch."""
    store = None
    if cached:
        store = cache_teacher(
            job.model(), job.config(), job.rows, None, job.tokenizer, folder=job.folder / "store"
        ).store
    options = {"processing_class": job.tokenizer, "peft_config": adapter(), "teacher_store": store}
    trainer = DuetTrainer(job.model(), job.config(), job.rows, **options)
    trainer.get_train_dataloader()

    def batch() -> dict[str, Tensor]:
        return trainer.data_collator([trainer.train_dataset[Draw(i, 0)] for i in range(job.shape.batch)])

    return trainer, batch


def sdft_trainer(job: Job, answers: list[list[int]]) -> tuple[Trainer, Callable[[], list[dict[str, str]]]]:
    """TRL's trainer on the same rows; in place of what it would sample stand the given answers."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class GivenAnswers(SDFTTrainer):
        def _generate(self, prompt_ids):
            return prompt_ids, answers

    rows = [{"prompt": row["prompt"], "privileged_context": job.prefix} for row in job.rows]
    args = SDFTConfig(
        **job.options(),
        teacher_model_kind="base",  # the adapter is switched off
        teacher_prompt_template="{privileged_context}\n\n{prompt}",
        distillation_mode="topk_logits",
        distillation_topk=job.shape.k,
        distillation_alpha=0.0,  # forward KL
        distillation_is_clip=None,
        num_generations=1,
        max_prompt_length=None,
        max_completion_length=job.shape.answer,
        **{CHECKPOINTING: False},
    )
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": job.tokenizer}
    trainer = GivenAnswers(job.model(), args, peft_config=adapter(), **data)
    return trainer, lambda: rows


def step_of(trainer: Trainer, batch: Callable[[], object]) -> Call:
    """One optimizer step through the trainer's own `training_step`."""
    trainer.model.to(trainer.args.device)
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        trainer.training_step(trainer.model, batch(), None)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Plain:
    """The student in a plain PyTorch loop, its targets in memory: S, and the parts F, H and the loss by themselves."""

    def __init__(self, job: Job, batch: dict[str, Tensor] | None, targets: TopK | None):
        self.k = job.shape.k
        self.model = get_peft_model(job.model(), adapter())
        if batch is None:  # no trainer made one
            ids = torch.randint(0, job.shape.v, (job.shape.batch, job.shape.prompt + job.shape.answer - 1))
            scored = torch.arange(ids.numel()).view_as(ids)[:, job.shape.prompt - 1 :]
            batch = {"input_ids": ids, "positions": scored.reshape(-1)}
        self.ids, self.positions = (batch[name].to(job.device) for name in ("input_ids", "positions"))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, fused=True)
        self.head = LMHead.of(self.model)
        with torch.no_grad():
            self.hidden = self.states()
        # No teacher: what is predicted elsewhere. Its own prediction would be learnt already, with a gradient of 0.
        self.targets = self.top(self.hidden.roll(1, 0)) if targets is None else targets

    def states(self) -> Tensor:
        hidden = self.model.get_decoder()(self.ids)[0]
        return hidden.flatten(0, 1).index_select(0, self.positions)

    def forward(self) -> None:
        with torch.no_grad(), self.model.disable_adapter():
            self.states()

    def top(self, hidden: Tensor | None = None) -> TopK:
        with torch.no_grad():
            return linear_topk(self.hidden if hidden is None else hidden, self.head, self.k)

    def value(self, hidden: Tensor, impl: str = "auto") -> Tensor:
        return topk_distill_loss(hidden, self.head, self.targets, divergence="forward_kl", impl=impl)

    def loss(self) -> None:
        hidden = self.hidden.detach().requires_grad_()
        torch.autograd.grad(self.value(hidden), hidden)

    def step(self, value: Callable[[Tensor], Tensor] | None = None) -> None:
        (value or self.value)(self.states()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step_without_loss(self) -> None:
        self.step(lambda hidden: hidden.square().mean())

    def sdft_loss(self) -> None:
        """What TRL's SDFT does between the hidden states and its loss."""
        from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

        hidden = self.hidden.detach().requires_grad_()
        told = self.hidden @ self.head.weight.T
        options = {"distillation_topk": self.k, "distillation_alpha": 0.0, "distillation_add_tail": False}
        loss = compute_topk_self_distillation_loss(hidden @ self.head.weight.T, told, **options).mean()
        torch.autograd.grad(loss, hidden)


# --- one run ----------------------------------------------------------------------------------------------------


def run(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> Run:
    """Measure one shape; a red gate measures nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(Job(shape, device, dtype, pathlib.Path(folder)), rounds)


def _run(job: Job, rounds: int) -> Run:
    shape, calls, took, losses = job.shape, {}, {}, {}
    batch, targets, teacher_tokens = None, None, 0
    if shape.compared:
        for name, cached in (("live teacher", False), ("cached teacher", True)):
            trainer, make = duet_trainer(job, cached)
            batch = trainer._prepare_inputs(make())
            losses[name] = trainer.compute_loss(trainer.model, batch).item()
            calls[name] = step_of(trainer, make)
            targets = trainer.teacher.targets(batch["targets"], None, None, None) if cached else targets
            teacher_tokens = max(teacher_tokens, batch.get("teacher_input_ids", torch.empty(0)).numel())
        answers = batch["labels"].view(shape.batch, shape.answer).tolist()
        try:
            calls["TRL SDFT"] = step_of(*sdft_trainer(job, answers))
        except ImportError as error:
            took["TRL SDFT"] = Measured(status=f"absent: {error.name or error} is not installed")
    plain = Plain(job, batch, targets)
    losses["student alone"] = plain.value(plain.hidden).item()
    losses["definition"] = plain.value(plain.hidden, "reference").item()
    calls |= {
        "student alone": plain.step,
        "student alone, no loss": plain.step_without_loss,
        "loss": plain.loss,
    }
    if shape.compared:
        calls |= {"forward": plain.forward, "top-k": plain.top}
    if "TRL SDFT" in calls:
        calls["loss of TRL SDFT"] = plain.sdft_loss
    result = Run(shape, job.dtype, took, plain.ids.numel(), teacher_tokens, losses)
    if result.green:
        took |= measure(calls, device=job.device, min_rounds=rounds, max_rounds=rounds)
    return result


def phases(name: str, arguments: argparse.Namespace, where: dict[str, str], deadline: float) -> list[dict]:
    """The sections of a shape, their rows written as they come."""
    device, dtype = torch.device(arguments.device), _dtype(arguments)
    kind = name if name in SECTIONS else "1b"  # a small shape trains as the 1B one does
    with contextlib.ExitStack() as stack:
        out = None
        if not arguments.no_write:
            folder = _folder(arguments)
            folder.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(open(folder / f"training_step_{name}.jsonl", "w"))
        bench = Bench(name, SHAPES[name], device, dtype, arguments.steps, where, deadline, out)
        rows = bench.run(SECTIONS[kind])
    text = phases_text(name, SHAPES[name], rows)
    print(text, end="\n\n", flush=True)
    if not arguments.no_write:
        (folder / f"training_step_{name}.md").write_text(_sections_page(where, dtype, text))
    return rows


def redrawn(folder: pathlib.Path) -> None:
    """The pages of the rows that lie in a folder; nothing is measured."""
    for path in sorted(folder.glob("training_step*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        where, dtype = rows[0], getattr(torch, rows[0]["dtype"])
        if rows[0]["op"] == "training_step":
            trl = next((row["provider_version"] for row in rows if row["variant"] == "TRL SDFT"), None)
            on_gpu = bool(where.get("driver"))
            texts = [table_of(name, done, on_gpu)[0] for name, done in runs_of(rows).items()]
            path.with_suffix(".md").write_text(_page(where, dtype, trl, texts))
        else:
            name = rows[0]["shape"]
            path.with_suffix(".md").write_text(
                _sections_page(where, dtype, phases_text(name, SHAPES[name], rows))
            )


def _folder(arguments: argparse.Namespace) -> pathlib.Path:
    return arguments.out or results_folder(torch.device(arguments.device).type)


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    return getattr(
        torch, arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    )


# What a step is, in either kind of page: numbers of one are not to be set beside numbers of the other.
ALTERNATING = (
    "A step is a batch, the trainer's `training_step` and the optimizer's: objective `duet_forward_kl`, forget rows alone, no "
    "autocast, no clipping of gradients, no schedule, no callbacks. All variants take turns in one process, 7 steps each unless "
    "`--rounds` says otherwise. The pages `training_step_*.md` time another step, a whole one of `DuetTrainer.train()`."
)
WHOLE = (
    "A step is a whole one of `DuetTrainer.train()`, from the data loader to the callbacks at its end: objective `duet` (Huber on raw "
    "logits), forget and retain rows, on a GPU autocast to bf16, with clipping of gradients and a schedule. One section after the "
    "other, the median of 3 steps unless `--steps` says otherwise. `training_step.md` times another step: the bare "
    "`training_step` of `duet_forward_kl`, whose variants take turns. Even where shape, batch and tokens are the same, only numbers of "
    "one page are comparable."
)


def _head(where: dict[str, str], dtype: torch.dtype, trl: str | None, how: str) -> str:
    return (
        f"{where['device']}, torch {where['torch']}, {f'trl {trl}, ' if trl else ''}{str(dtype).removeprefix('torch.')}, "
        f"commit {where['commit']}; LoRA r = 16 on all linear layers, AdamW; `make bench-step`. Answers are given: nobody "
        f"generates.\n\n{how}"
    )


def _page(where: dict[str, str], dtype: torch.dtype, trl: str | None, sections: Sequence[str]) -> str:
    return "\n\n".join([_head(where, dtype, trl, ALTERNATING), *sections]) + "\n"


def _sections_page(where: dict[str, str], dtype: torch.dtype, text: str) -> str:
    return f"{_head(where, dtype, None, WHOLE)}\n\n{text}\n"


def _stop(seconds: float) -> None:
    print(
        f"stopped after {seconds:.0f} s; the rows measured until then are written",
        file=sys.stderr,
        flush=True,
    )
    os._exit(3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: small wide on a CPU, else 8b 1b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each section")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="after so many it stops, with what it has"
    )
    parser.add_argument("--sections", action="store_true", help="time and memory by phase, for any shape")
    parser.add_argument(
        "--figures", action="store_true", help="only the pages, of the rows that lie in --out"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--out", type=pathlib.Path, help="folder; default: results/<device or cpu>")
    arguments = parser.parse_args(argv)
    if arguments.figures:
        redrawn(_folder(arguments))
        return 0
    deadline = time.monotonic() + arguments.seconds
    # A device that does not answer: the process ends, and the rows are in the files.
    timer = threading.Timer(arguments.seconds + 10, _stop, [arguments.seconds])
    timer.daemon = True
    timer.start()
    try:
        return _main(arguments, deadline)
    finally:
        timer.cancel()


def _main(arguments: argparse.Namespace, deadline: float) -> int:
    device, dtype = torch.device(arguments.device), _dtype(arguments)
    on_gpu = device.type == "cuda"
    where = environment(device)
    rows, sections, all_met = [], [], True
    for name in arguments.shape or (["8b", "1b"] if on_gpu else ["small", "wide"]):
        if name in SECTIONS or arguments.sections:
            found = phases(name, arguments, where, deadline)
            all_met &= all(row["status"] == "ok" and goal_met(row) is not False for row in found)
        if name in ALONE:
            continue
        try:
            with within(deadline - time.monotonic()):
                done = run(SHAPES[name], device, dtype, arguments.rounds)
        except OutOfTime:
            print(f"{name}: its variants side by side were not measured in time", file=sys.stderr)
            all_met = False
            continue
        except torch.OutOfMemoryError as error:
            print(f"{name}: {why(error)}", file=sys.stderr)
            return 1
        if not done.green:
            told = ", ".join(f"{variant} {loss:.6g}" for variant, loss in done.losses.items())
            print(f"correctness gate: RED - no speed is reported ({name}: losses {told})", file=sys.stderr)
            return 1
        rows += rows_of(name, done, where)
        text, met = table_of(name, done, on_gpu)
        sections.append(text)
        all_met &= met
        print(text, end="\n\n", flush=True)
        if not arguments.no_write:
            out = _folder(arguments)
            out.mkdir(parents=True, exist_ok=True)
            (out / "training_step.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (out / "training_step.md").write_text(_page(where, dtype, version("trl"), sections))
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
