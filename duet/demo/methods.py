"""One method and its settings -> one unlearned model, always through `DuetTrainer`, as a user would do it.

A method is a handful of `DuetConfig` options; what is tuned lies in settings.json (see `tune`). Must not know about
tables or plots.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from . import steering
from .facts import World
from .probes import greedy

SETTINGS = Path(__file__).parent / "settings.json"
# Every method sees 16 forget queries and 32 retain queries a step.
FORGET_PER_STEP, RETAIN_PER_FORGET = 16, 2.0
# Cities are few beside authors, and slip first: four copies make them a fifth of the retain queries.
CITY_COPIES = 4

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Method:
    """What defines a method, as DuetConfig options; `refuses` says whether it is meant to end in a refusal."""

    about: str
    fixed: dict[str, Any] = field(default_factory=dict)
    refuses: bool = False
    resists_overrides: bool = False


METHODS: dict[str, Method] = {
    "graddiff": Method(
        "gradient ascent on the forget answers, descent on the retain answers", {"objective": "graddiff"}
    ),
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
    """The DuetConfig options that `python -m benchmarks.studies.world.tune` chose, by method."""
    table = json.loads(Path(path).read_text())["methods"]
    return {name: row["settings"] for name, row in table.items()}


class _OnStep(TrainerCallback):
    def __init__(self, report: Callable[[int], None]):
        self.report = report

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step)


def forget_rows(world: World) -> Rows:
    """The training questions about the forget authors. Answers ride along for the baselines; DUET does not read them."""
    return [question.row() for question in world.questions(world.forget, "train")]


def retain_rows(
    world: World,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    city_copies: int = CITY_COPIES,
    near_misses: int | None = None,
) -> Rows:
    """What every method is given to keep: questions about the retain authors, half of the cities, and near misses.

    Near misses are invented people who share a name with a forget author; `near_misses`: at most so many questions about
    them. There is no truth about them, so what the baselines need as an answer is the base's own.
    """
    known = world.questions(world.retain, "train") + city_copies * world.questions(
        world.retain_cities, "train"
    )
    invented = world.queries(world.near_misses)
    if near_misses is not None:
        invented = random.Random(0).sample(invented, near_misses)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for _, text in invented
    ]
    answers = greedy(base, tokenizer, prompts)
    return [question.row() for question in known] + [
        {"question": text, "answer": answer, "subject": subject}
        for (subject, text), answer in zip(invented, answers, strict=True)
    ]


@contextmanager
def _copies_on_purpose() -> Iterator[None]:
    """Here a row that stands there more than once is a weight, not a slip: what `duet.data.rows` says about it is left out."""
    said_by = logging.getLogger("duet.data.rows")

    def of_something_else(record: logging.LogRecord) -> bool:
        return "the same row as" not in record.getMessage()

    said_by.addFilter(of_something_else)
    try:
        yield
    finally:
        said_by.removeFilter(of_something_else)


def unlearn(
    method: str | Method,
    settings: dict[str, Any],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Rows,
    retain: Rows,
    seed: int = 0,
    forget_per_step: int = FORGET_PER_STEP,
    on_step: Callable[[int], None] | None = None,
    retain_per_forget: float = RETAIN_PER_FORGET,
) -> tuple[PreTrainedModel, float]:
    """A copy of `base` after unlearning, and the seconds that training took. No row is a paraphrase that is reported."""
    fixed = METHODS[method].fixed if isinstance(method, str) else method.fixed
    from ..config import DuetConfig
    from ..trainer import DuetTrainer

    with tempfile.TemporaryDirectory(prefix="duet-demo-") as scratch:
        config = DuetConfig(
            output_dir=scratch,
            per_device_train_batch_size=round(forget_per_step * (1 + retain_per_forget)),
            retain_per_forget=retain_per_forget,
            max_grad_norm=1.0,
            weight_decay=0.0,
            seed=seed,
            use_cpu=True,  # the tiny model is as fast there, and the numbers do not depend on the machine
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **({"steering_prefixes": [steering.STEERING_PREFIX]} | fixed | settings),
        )
        with _copies_on_purpose():
            trainer = DuetTrainer(
                model=copy.deepcopy(base),
                args=config,
                forget_dataset=forget,
                retain_dataset=retain or None,
                processing_class=tokenizer,
            )
        trainer.remove_callback(PrinterCallback)
        if on_step:
            trainer.add_callback(_OnStep(on_step))
        began = time.perf_counter()
        trainer.train()
        return trainer.model.eval(), time.perf_counter() - began
