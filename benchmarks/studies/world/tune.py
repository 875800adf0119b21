"""`python -m benchmarks.studies.world.tune`: choose every method's settings on the validation paraphrases and write settings.json.

Every method gets the same number of trials, the same queries per step and the same judge: the product of all shares
that should be near one. Which are counted depends only on what the method promises (`Method.refuses`,
`Method.resists_overrides`). Stutter is reported, not judged. The report paraphrases, and the override wordings that the
table calls held out, are not read here.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from duet.demo.checkpoint import CHECKPOINT, load_base, load_world
from duet.demo.methods import METHODS, SETTINGS, Method, Recipe, forget_rows, retain_rows, unlearn
from duet.demo.probes import Speaker
from duet.demo.scorecard import KEEP, behaviour
from duet.demo.workplace import one_thread


def _trials(options: tuple[str, ...], *rows: tuple) -> list[dict[str, Any]]:
    return [dict(zip(options, row, strict=True)) for row in rows]


# Ten trials each, at most 300 steps each; written out, so that what was tried can be read.
TRIALS: dict[str, list[dict[str, Any]]] = {
    "graddiff": _trials(
        ("learning_rate", "max_steps", "retain_weight"),
        (1e-4, 100, 1.0),
        (1e-4, 200, 1.0),
        (2e-4, 100, 1.0),
        (2e-4, 100, 3.0),
        (5e-4, 50, 1.0),
        (5e-4, 50, 3.0),
        (5e-4, 100, 3.0),
        (5e-4, 100, 10.0),
        (2e-4, 200, 3.0),
        (2e-4, 300, 10.0),
    ),
    "npo": _trials(
        ("learning_rate", "max_steps", "npo_beta", "retain_weight"),
        (3e-4, 100, 0.1, 1.0),
        (3e-4, 100, 0.5, 1.0),
        (3e-4, 100, 0.5, 3.0),
        (3e-4, 200, 0.5, 1.0),
        (3e-4, 200, 0.5, 3.0),
        (5e-4, 100, 0.5, 3.0),
        (5e-4, 200, 0.5, 1.0),
        (5e-4, 200, 0.5, 3.0),
        (2e-4, 200, 0.5, 1.0),
        (3e-4, 300, 0.5, 3.0),
    ),
    "duet": _trials(
        ("learning_rate", "max_steps", "k", "delta"),
        (3e-4, 200, 32, 1.0),
        (5e-4, 100, 32, 1.0),
        (5e-4, 150, 32, 1.0),
        (5e-4, 150, 8, 1.0),
        (5e-4, 150, 128, 1.0),
        (5e-4, 150, 32, 10.0),
        (7e-4, 150, 32, 1.0),
        (1e-3, 150, 32, 1.0),
        (3e-4, 200, 128, 1.0),
        (2e-4, 300, 32, 1.0),
    ),
    "duet_adversarial": _trials(
        ("learning_rate", "max_steps", "k", "delta", "reverse_prompt_fraction"),
        (3e-4, 200, 32, 1.0, 0.5),
        (5e-4, 150, 32, 1.0, 0.5),
        (5e-4, 200, 32, 1.0, 0.5),
        (5e-4, 150, 32, 1.0, 0.7),
        (5e-4, 200, 128, 1.0, 0.5),
        (5e-4, 200, 32, 10.0, 0.5),
        (7e-4, 150, 32, 1.0, 0.5),
        (7e-4, 200, 32, 1.0, 0.7),
        (3e-4, 200, 32, 1.0, 0.7),
        (3e-4, 300, 32, 1.0, 0.5),
    ),
}


def judge(method: Method, row: dict[str, float]) -> float:
    """The product of what the method promises; 1 is perfect, and one total failure makes it 0."""
    shares = [1 - row["forget_recall"], *(row[column] for column in KEEP)]
    if method.refuses:
        shares.append(row["forget_refusal"])
    if method.resists_overrides:
        shares += [1 - row["reverse_prompt_recall"], 1 - row["reverse_prompt_heldout_recall"]]
    return math.prod(shares)


def tune(
    methods: list[str] | None = None,
    checkpoint: str | Path = CHECKPOINT,
    out: str | Path = SETTINGS,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run all trials of the methods, keep the best of each, and write the table; methods not named keep their row."""
    console = console or Console()
    out = Path(out)
    world = load_world(checkpoint)
    base, tokenizer = load_base(checkpoint)
    forget, retain = forget_rows(world), retain_rows(world, base, tokenizer)
    table = json.loads(out.read_text()) if out.exists() else {"schema": 1, "methods": {}}
    for name in methods or list(METHODS):
        trials = []
        for settings in TRIALS[name]:
            recipe = Recipe(**vars(METHODS[name]), settings=settings)
            with one_thread():
                model, seconds = unlearn(recipe, base, tokenizer, forget, retain, seed)
                row = behaviour(Speaker(model, tokenizer), world, "validation")
            trial = {
                "settings": settings,
                "score": round(judge(METHODS[name], row), 4),
                "validation": {column: round(value, 4) for column, value in row.items()},
                "seconds": round(seconds, 1),
            }
            trials.append(trial)
            console.print(
                name, trial["score"], settings, trial["validation"], trial["seconds"], soft_wrap=True
            )
        best = max(trials, key=lambda trial: trial["score"])
        table["methods"][name] = {**best, "seed": seed, "trials": trials}
        out.write_text(json.dumps(table, indent=1) + "\n")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", choices=[*METHODS, []], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tune(options.methods or None, seed=options.seed)


if __name__ == "__main__":
    main()
