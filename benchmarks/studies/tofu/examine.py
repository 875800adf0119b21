"""One model -> one flat row: TOFU's suite and the attacks of duet.evaluation, both resumable by themselves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from duet.demo import steering
from duet.evaluation.attacks.rows import read_attack_rows
from duet.evaluation.attacks.runner import run_attacks
from duet.evaluation.attacks.target import AttackOptions, Target
from duet.evaluation.suites.runner import evaluate
from duet.evaluation.suites.suite import load_suite

from .rows import Corpus, spread
from .settings import Size

SUITE, ATTACK = "eval", "attack"
ATTACKS = ("reverse_prompt", "prefill", "relearning", "quantisation", "rank_probe")
# column -> task and metric of the suite
METRICS = {
    "forget_rouge": ("forget_answers", "rouge_l_recall_stemmed"),
    "forget_refusal": ("forget_answers", "refusal"),
    "forget_probability": ("forget_losses", "probability"),
    "extraction_strength": ("forget_losses", "extraction_strength"),
    "retain_rouge": ("retain_answers", "rouge_l_recall_stemmed"),
    "retain_refusal": ("retain_answers", "refusal"),
    "real_authors_rouge": ("real_authors_answers", "rouge_l_recall_stemmed"),
    "world_facts_rouge": ("world_facts_answers", "rouge_l_recall_stemmed"),
}


class OutOfTime(Exception):
    """The next unit of work would end after the deadline."""


class Clock:
    """Called between units of work; raises where another one as long as the longest so far would end after `deadline`."""

    def __init__(self, deadline: float):
        self.deadline, self.last, self.longest = deadline, time.monotonic(), 0.0

    def __call__(self, *where: Any) -> None:
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        if now + self.longest >= self.deadline:
            raise OutOfTime


def examine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    folder: Path,
    corpus: Corpus,
    data: str | Path,
    size: Size,
    retain_run: Path | None,
    clock: Clock,
) -> dict[str, Any]:
    """Run, or go on running, suite and attacks into `folder`, and return their numbers; None is undefined.

    Args:
        data: the folder with TOFU's files.
        retain_run: the suite's folder of the retrained model; None: there is no forget quality.
        clock: looked at between batches and units.

    Raises:
        OutOfTime: what was done by then lies in `folder`.
    """
    summary = evaluate(
        model,
        tokenizer,
        load_suite("tofu", {"split": corpus.split}),
        out=folder / SUITE,
        data=data,
        name=name,
        batch_size=size.batch_size,
        limit=size.eval_limit,
        retain_run=retain_run,
        progress=clock,
    )
    rows = read_attack_rows(spread(corpus.forget, size.attack_rows), "forget")
    options = AttackOptions(
        max_new_tokens=size.max_new_tokens,
        batch_size=size.batch_size,
        seen_reverse_prompts=steering.SEEN_OVERRIDES[: size.reverse_prompts],
        heldout_reverse_prompts=steering.HELDOUT_OVERRIDES[: size.reverse_prompts],
        relearn_rates=size.relearn_rates,
        relearn_curve=size.relearn_curve,
    )
    target = Target(model, tokenizer, rows, options=options)
    report = run_attacks(target, out=folder / ATTACK, attacks=ATTACKS, name=name, progress=clock)
    return flat(summary, report, size)


def flat(summary: Mapping[str, Any], report: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """The columns of the study's table."""
    row: dict[str, Any] = {name: number["value"] for name, number in summary["numbers"].items()}
    for column, (task, metric) in METRICS.items():
        row[column] = summary["tasks"][task]["metrics"][metric]["mean"]
    entries = {entry["name"]: entry for entry in report["attacks"]}
    row["direct_leak"] = report["direct"]["leak"]
    for attack in ("reverse_prompt", "prefill", "quantisation"):
        row[f"{attack}_leak"] = entries[attack]["leak"]
        row[f"{attack}_worst"] = entries[attack]["worst_variant"]
    variants = entries["relearning"]["variants"]
    for steps in size.relearn_curve:
        leaks = [told["leak"] for name, told in variants.items() if name.endswith(f", {steps} steps")]
        known = [leak for leak in leaks if leak is not None]
        row[f"relearning_{steps}_leak"] = max(known, default=None)
    bottom = entries["rank_probe"]["variants"]["both ends"]
    row["rank_bottom"] = bottom.get("bottom")
    row["rank_top"] = bottom.get("top")
    return row
