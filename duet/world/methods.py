"""One method and its settings -> one unlearned model, always through `DuetTrainer`, as a user would do it.

A method is a handful of `DuetConfig` options; what is tuned lies in settings.json (see `tune`). Must not know about
probes, tables or plots.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from . import steering
from .facts import World

SETTINGS = Path(__file__).parent / "settings.json"
FORGET_ROWS, RETAIN_PER_FORGET = 16, 2.0  # per step: 16 forget queries and 32 retain queries, for every method


@dataclass(frozen=True)
class Method:
    """What defines a method, as DuetConfig options; `refuses` says whether it is meant to end in a refusal."""

    about: str
    fixed: dict[str, Any] = field(default_factory=dict)
    refuses: bool = False
    resists_overrides: bool = False


METHODS: dict[str, Method] = {
    "ga": Method("gradient ascent on the forget answers, descent on the retain answers", {"objective": "ga"}),
    "npo": Method("negative preference optimisation, descent on the retain answers", {"objective": "npo"}),
    "duet": Method(
        "the paper's: Huber on the steered teacher's top-k logits at the first answer token, plain queries",
        {"objective": "duet", "positions": "first"},
        refuses=True,
    ),
    "duet_adversarial": Method(
        "the same, but a share of the student's queries opens with a reverse prompt; the teacher's never do",
        {"objective": "duet", "positions": "first", "reverse_prompts": list(steering.SEEN_OVERRIDES)},
        refuses=True,
        resists_overrides=True,
    ),
}


def load_settings(path: Path = SETTINGS) -> dict[str, dict[str, Any]]:
    """The DuetConfig options that `python -m duet.world.tune` chose, by method."""
    table = json.loads(Path(path).read_text())["methods"]
    return {name: row["settings"] for name, row in table.items()}


class _OnStep(TrainerCallback):
    def __init__(self, report: Callable[[int], None]):
        self.report = report

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step)


def unlearn(
    method: str,
    settings: dict[str, Any],
    checkpoint: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> tuple[PreTrainedModel, float]:
    """The base of `checkpoint` after unlearning the authors F, and the seconds that training took.

    The trainer sees the training questions about F, and about the retain authors and cities; no paraphrase, no other
    author. Answers ride along for the baselines; the distillation objectives do not read them.
    """
    from duet.config import DuetConfig
    from duet.trainer import DuetTrainer

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    forget_rows = [q.row() for q in world.questions(world.forget, "train")]
    retain_rows = [q.row() for q in world.questions(world.retain + world.retain_cities, "train")]
    with tempfile.TemporaryDirectory(prefix="duet-demo-") as scratch:
        config = DuetConfig(
            output_dir=scratch,
            steering_prefixes=[steering.STEERING_PREFIX],
            per_device_train_batch_size=round(FORGET_ROWS * (1 + RETAIN_PER_FORGET)),
            retain_per_forget=RETAIN_PER_FORGET,
            max_grad_norm=1.0,
            weight_decay=0.0,
            seed=seed,
            use_cpu=True,  # the tiny model is as fast there, and the numbers do not depend on the machine
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **METHODS[method].fixed,
            **settings,
        )
        trainer = DuetTrainer(
            model=model,
            args=config,
            forget_dataset=forget_rows,
            retain_dataset=retain_rows,
            processing_class=tokenizer,
        )
        if on_step:
            trainer.add_callback(_OnStep(on_step))
        began = time.perf_counter()
        trainer.train()
        return trainer.model.eval(), time.perf_counter() - began
