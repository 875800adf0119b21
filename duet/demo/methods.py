"""One method and its settings -> one unlearned model, always through `DuetTrainer`, as a user would do it.

A method is a handful of `DuetConfig` options; what is tuned lies in settings.json (`benchmarks.studies.world.tune`).
"""

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

from ..config import DuetConfig
from ..names import check_one_of
from ..trainer import DuetTrainer
from . import steering, words
from .facts import World
from .probes import MAX_NEW_TOKENS, Speaker

SETTINGS = Path(__file__).parent / "settings.json"
# Every method sees 16 forget queries and 32 retain queries a step.
FORGET_PER_STEP, RETAIN_PER_FORGET = 16, 2.0
# There are few cities, and they are forgotten first: four copies make them a fifth of the retain queries.
CITY_COPIES = 4

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Method:
    """What defines a method, as DuetConfig options; `refuses` says whether it is meant to end in a refusal."""

    about: str
    fixed: dict[str, Any] = field(default_factory=dict)
    refuses: bool = False
    resists_overrides: bool = False


OVERRIDES = {"reverse_prompts": list(steering.SEEN_OVERRIDES)}
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
        {"objective": "duet", "positions": "first", **OVERRIDES},
        refuses=True,
        resists_overrides=True,
    ),
}


@dataclass(frozen=True)
class Recipe(Method):
    """A method together with its settings and its mix of rows."""

    forget_per_step: int = FORGET_PER_STEP
    retain_per_forget: float = RETAIN_PER_FORGET
    city_copies: int = CITY_COPIES
    near_misses: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


STRANGERS = 30


def strangers() -> list[str]:
    """Names of people whom pretraining never gave a fact."""
    rng = random.Random(0)
    first = rng.sample(words.STRANGER_FIRST_NAMES, STRANGERS)
    return [f"{a} {b}" for a, b in zip(first, rng.sample(words.STRANGER_LAST_NAMES, STRANGERS), strict=True)]


# Its settings are written down here; unlike those of METHODS they were not searched for on a grid.
RECIPES: dict[str, Recipe] = {
    "duet_deep": Recipe(
        "refusal at the first token, masked NPO and a counterfactual pull on the base's own prefilled answers",
        {
            "objective": "duet_deep",
            "reverse_prompt_fraction": 2 / 3,
            "reverse_prompt_role": "both",
            "counterfactual_names": strangers(),
            "max_answer_tokens": MAX_NEW_TOKENS,
            **OVERRIDES,
        },
        refuses=True,
        resists_overrides=True,
        forget_per_step=32,
        retain_per_forget=1.5,
        city_copies=6,
        near_misses=400,
        settings={"learning_rate": 5e-4, "max_steps": 150, "warmup_steps": 10},
    ),
}


def load_settings() -> dict[str, dict[str, Any]]:
    """The DuetConfig options that `python -m benchmarks.studies.world.tune` chose, by method."""
    table = json.loads(SETTINGS.read_text(encoding="utf-8"))["methods"]
    return {name: row["settings"] for name, row in table.items()}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or one of the demo's methods with its tuned settings."""
    check_one_of("method", name, [*RECIPES, *METHODS])
    if name in RECIPES:
        return RECIPES[name]
    return Recipe(**vars(METHODS[name]), settings=load_settings()[name])


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
    """The retain rows of every method: questions about the retain authors, half of the cities, and near misses.

    Near misses are invented people who share a name with a forget author; `near_misses`: at most so many questions about
    them. There are no facts about them, so the answer that baselines need is the base's own.
    """
    known = world.questions(world.retain, "train")
    known += city_copies * world.questions(world.retain_cities, "train")
    invented = world.queries(world.near_misses)
    if near_misses is not None:
        invented = random.Random(0).sample(invented, near_misses)
    answers = Speaker(base, tokenizer).answers(invented)
    made_up = [
        question.row() | {"answer": answer} for question, answer in zip(invented, answers, strict=True)
    ]
    return [question.row() for question in known] + made_up


@contextmanager
def _copies_on_purpose() -> Iterator[None]:
    """Repeated rows are intended here, as a weight: the warning of `duet.data.rows` is suppressed."""
    said_by = logging.getLogger("duet.data.rows")

    def of_something_else(record: logging.LogRecord) -> bool:
        return "the same row as" not in record.getMessage()

    said_by.addFilter(of_something_else)
    try:
        yield
    finally:
        said_by.removeFilter(of_something_else)


def unlearn(
    recipe: Recipe,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Rows,
    retain: Rows,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> tuple[PreTrainedModel, float]:
    """A copy of `base` after unlearning, and the seconds that training took. No row is a paraphrase that is reported."""
    options: dict[str, Any] = (
        {"steering_prefixes": [steering.STEERING_PREFIX]} | recipe.fixed | recipe.settings
    )
    with tempfile.TemporaryDirectory(prefix="duet-demo-") as scratch:
        config = DuetConfig(
            output_dir=scratch,
            per_device_train_batch_size=round(recipe.forget_per_step * (1 + recipe.retain_per_forget)),
            retain_per_forget=recipe.retain_per_forget,
            max_grad_norm=1.0,
            weight_decay=0.0,
            seed=seed,
            use_cpu=True,  # as fast for the tiny model, and independent of the machine
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **options,
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
