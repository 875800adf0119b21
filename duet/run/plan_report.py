"""`duet plan`: a RunConfig and a GPU's size -> two tables: where the memory goes, and which settings fit."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig

from duet_kernels.dispatch import share_of

from ..config import CHECKPOINTING
from ..methods.objectives import Objective, find_objective
from ..methods.views import asked_before_training, scored_positions
from ..model.adapters import base_of, holds_adapter
from .config_file import DEFAULT_ADAPTER, RunConfig
from .plan import Budget, Planner, Settings

# Options that transformers refuses on a machine without a fitting GPU: a plan is also made on a laptop.
_DEVICE_OPTIONS = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")
# What is planned for a bare model name.
DEFAULT_TREE = {
    "model": {"dtype": "bfloat16"},
    "adapter": {},
    "data": {"forget": "rows that a plan does not read"},
    "training": {"bf16": True},
}
_UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str, name: str = "gpu-memory") -> int:
    """Bytes of `24GiB`, `24G` or `24GB` (GPU makers' GB is 2^30); a number alone is GiB.

    Example:
        >>> parse_size("1.5 GiB"), parse_size("24") >> 30, parse_size("512m") >> 20
        (1610612736, 24, 512)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:([kmgt])(?:i?b)?)?\s*", text.lower())
    if not match or float(match[1]) > 1e12 or (float(match[1]) == 0 and name == "gpu-memory"):
        raise ValueError(f"{name}: wanted a size such as 24GiB, got {text!r:.60}")
    return int(float(match[1]) * 2 ** _UNITS[match[2] or "g"])


@dataclass(frozen=True)
class Plan:
    """What `duet plan` found out: `as_dict()` for `--json`, `tables()` for people."""

    name: str
    memory: int
    reserve: int
    settings: Settings
    budget: Budget
    fitting: list[dict[str, Any]]

    @classmethod
    def of(
        cls,
        tree: Mapping[str, Any],
        memory: int,
        length: int,
        prefix_length: int,
        scored: int | None,
        reserve: int,
        subjects: int = 1,
    ) -> "Plan":
        """A plan for the tree of a run's YAML file.

        Args:
            tree: as `RunConfig.of` takes it.
            memory: of the GPU, bytes.
            length: tokens of the longest query with its answer.
            prefix_length: tokens that the steering prefix adds for the teacher.
            scored: positions of a query that reach the LM head; None: as many as the method may score.
            reserve: bytes that are kept free: the CUDA context, and what fragmentation costs.
            subjects: whose steering prefixes a live teacher reads once, and keeps.
        """
        training = dict(tree.get("training") or {})
        taken = {name: training.pop(name) for name in _DEVICE_OPTIONS if name in training}
        run = RunConfig.of({**tree, "training": training | {"use_cpu": True}})
        args, objective = run.training, find_objective(run.training.objective)
        try:
            adapted = holds_adapter(run.model.name)
            name, revision = (
                (base_of(run.model.name), None) if adapted else (run.model.name, run.model.revision)
            )
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"model: no configuration of {run.model.name!r} could be read: {error}"
            ) from error
        named, saved = run.model.dtype, getattr(config, "dtype", None) or torch.float32
        settings = Settings(
            batch=args.per_device_train_batch_size,
            length=length,
            teacher_length=length + (prefix_length if objective.is_steered else 0),
            scored=scored or _scored(objective, args, length),
            subjects=subjects * len(args.steering_prefixes) if args.reuse_prefix else 0,
            dtype=saved if named == "auto" else getattr(torch, named),
            autocast=taken.get("bf16") is not False or bool(taken.get("fp16")),  # as on a GPU
            adapter=run.adapter,
            quantization=run.model.quantization,
            checkpointing=bool(getattr(args, CHECKPOINTING)),
            accumulation=args.gradient_accumulation_steps,
            optim=getattr(args.optim, "value", args.optim),
            teacher=_teacher(run, adapted=run.adapter is not None),
            sharp=objective.sharp,
            workspace=args.workspace_bytes or share_of(memory),
        )
        planner = Planner(config)
        budget = planner.budget(settings)
        return cls(
            name=run.model.name,
            memory=memory,
            reserve=reserve,
            settings=settings,
            budget=budget,
            fitting=list(_fitting(planner, settings, _teacher(run, adapted=False), memory - reserve)),
        )

    @property
    def fits(self) -> bool:
        return self.budget.peak + self.reserve <= self.memory

    def as_dict(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        settings = {**vars(self.settings), "dtype": str(self.settings.dtype).removeprefix("torch.")}
        budget = {**vars(self.budget), "standing": self.budget.standing, "peak": self.budget.peak}
        common = {"model": self.name, "gpu_memory": self.memory, "reserve": self.reserve, "fits": self.fits}
        return common | {"settings": settings, "bytes": budget, "fitting": self.fitting}

    def tables(self) -> list[Table]:
        """Where the memory goes, and which settings fit."""
        s, b = self.settings, self.budget
        title = f"{self.name}: {b.parameters / 1e9:.2f} G parameters, {b.trained / 1e6:.1f} M trained"
        described = (
            f"batch {s.batch} x {s.length} tokens (teacher {s.teacher_length}), at most {s.scored} scored a query, "
            f"checkpointing {'on' if s.checkpointing else 'off'}, accumulation {s.accumulation}, workspace "
            f"{s.workspace / 2**20:.0f} MiB"
        )
        where = Table("GiB", "for", title=title, caption=described)
        leading = max(b.phases, key=b.phases.__getitem__)
        rows = [
            (b.weights, f"weights ({s.stored})"),
            (b.adapter, "adapter"),
            (b.optimizer, f"optimizer states ({s.optim})"),
            (b.teacher_weights, f"the teacher's weights ({s.teacher})"),
            (b.prefixes, f"keys and values of {s.subjects} steering prefix{'es' if s.subjects > 1 else ''}"),
            *(
                (size, f"{phase}{' <- the peak' if phase == leading else ''}")
                for phase, size in b.phases.items()
            ),
            (self.reserve, "reserve: CUDA context and fragmentation (assumed, --reserve)"),
        ]
        for size, text in rows:
            where.add_row(_gib(size), text)
        where.add_section()
        verdict = "fits" if self.fits else "does not fit"
        where.add_row(_gib(b.peak + self.reserve), f"at the peak; {verdict} into {_gib(self.memory)} GiB")
        fit = Table(
            "trained",
            "base",
            "checkpointing",
            "largest batch",
            "GiB at batch 1",
            title=f"What fits into {_gib(self.memory)} GiB",
        )
        for row in self.fitting:
            checkpointing, peak = ("off", "on")[row["checkpointing"]], _gib(row["peak_at_1"] + self.reserve)
            fit.add_row(row["trained"], row["base"], checkpointing, str(row["largest_batch"] or "-"), peak)
        return [where, fit]


def _scored(objective: Objective, args: Any, length: int) -> int:
    """The most positions that a query of `length` tokens, prompt and answer, may have scored."""
    positions = scored_positions(objective, args)
    made = not objective.needs_answers and (positions == "prepared" or args.answer_source == "teacher")
    whole = args.max_answer_tokens if made and positions != "text" else length
    return min({"first": 1, "first_n": args.num_positions}.get(positions, whole), length)


def _teacher(run: RunConfig, adapted: bool) -> str:
    """Who teaches this run, if it trains an adapter, or all weights."""
    objective = find_objective(run.training.objective)
    if not objective.has_teacher:
        return "none"
    if run.training.teacher_store:
        return "cache"
    if run.teacher:
        return "copy"
    if adapted:
        return "adapter off"
    return "before training" if asked_before_training(objective, run.training) else "copy"


def _fitting(planner: Planner, settings: Settings, whole_teacher: str, memory: int):
    """The ways to train that differ in kind, each with and without activation checkpointing."""
    adapter = settings.adapter or dict(DEFAULT_ADAPTER)
    lora = replace(settings, adapter=adapter, teacher="none" if settings.teacher == "none" else "adapter off")
    whole = replace(settings, adapter=None, quantization=None, teacher=whole_teacher)
    named = {
        "none": "all weights",
        "before training": "all weights, teacher asked before training",
        "copy": "all weights, teacher a copy",
        "cache": "all weights, teacher from a cache",
    }
    teachers = (whole_teacher,) if whole_teacher in ("none", "before training") else ("copy", "cache")
    ways = [(f"LoRA r={adapter['r']}", replace(lora, quantization=base)) for base in (None, "int8", "nf4")]
    ways += [(named[teacher], replace(whole, teacher=teacher)) for teacher in teachers]
    for trained, way in ways:
        for checkpointing in (False, True):
            way = replace(way, checkpointing=checkpointing)
            yield {
                "trained": trained,
                "base": way.stored,
                "checkpointing": checkpointing,
                "largest_batch": planner.largest_batch(way, memory),
                "peak_at_1": planner.budget(replace(way, batch=1)).peak,
            }


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
