"""`python -m duet.world.tune`: choose every method's settings on the validation paraphrases and write settings.json.

Every method gets the same number of trials and the same queries per step, and the same judge: the product of all shares
that should be near one. Which are counted depends only on what the method promises (`Method.refuses`,
`Method.resists_overrides`). The report paraphrases, and the override wordings that the table calls held out, are not read
here. Must not know about tables or plots.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from .facts import World
from .methods import METHODS, SETTINGS, Method, unlearn
from .pretrain import CHECKPOINT
from .probes import Speaker
from .scorecard import KEEP, behaviour

TRIALS: dict[str, list[dict[str, Any]]] = {
    "ga": [],
    "npo": [],
    "duet": [],
    "duet_adversarial": [],
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
    out, checkpoint = Path(out), Path(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    world = World.make(json.loads((checkpoint / "quality.json").read_text())["seed"])
    table = json.loads(out.read_text()) if out.exists() else {"schema": 1, "methods": {}}
    for name in methods or list(METHODS):
        trials = []
        for settings in TRIALS[name]:
            model, seconds = unlearn(name, settings, checkpoint, tokenizer, world, seed)
            row = behaviour(Speaker(model, tokenizer), world, "validation")
            trial = {
                "settings": settings,
                "score": round(judge(METHODS[name], row), 4),
                "validation": {column: round(value, 4) for column, value in row.items()},
                "seconds": round(seconds, 1),
            }
            trials.append(trial)
            console.print(name, trial["score"], settings, trial["validation"], trial["seconds"], soft_wrap=True)
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
