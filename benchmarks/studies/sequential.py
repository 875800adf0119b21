"""Three requests, one after the other, in the tiny world: who is still told of after each? `python -m benchmarks.studies.sequential`.

    base --forget A--> first --forget B--> second --forget C--> third

Each request is what `duet train --config run.yaml --model FIRST --data.forget B --output_dir SECOND` does: LoRA, DUET at the first
answer token. After each, every person is asked about, plainly and with a forced opening, and so are authors that no training saw.
A job is one seed: three other persons, and all arms. Rows are appended to results.jsonl; the page is written from them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.studies.runner import made_with, rows_of_seeds, run_seeds
from duet.demo import steering
from duet.demo.checkpoint import CHECKPOINT, load_world
from duet.demo.facts import Question, World
from duet.demo.probes import Speaker
from duet.demo.scorecard import some
from duet.demo.workplace import one_thread
from duet.evaluation.models import load
from duet.run.commands import train
from duet.run.config_file import RunConfig

OUT, PAGE = Path("benchmarks/results/sequential"), "sequential.md"
SEEDS, REQUESTS, STEPS = (0, 1, 2), 3, 100
KEPT_QUESTIONS = 100  # of authors whom nobody wants forgotten
CITY_COPIES = 4
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """How the requests follow each other.

    `earlier`: DuetConfig's `earlier_adapter`; `base_teaches`: whether `teacher:` is the original base, and not what the request
    before made; `again`: whether the rows of earlier requests are in `data.forget` again.
    """

    label: str
    earlier: str = "merge"
    base_teaches: bool = False
    again: bool = False


ARMS = {
    "merge": Arm("the new rows alone (the default)"),
    "keep": Arm("the same with `earlier_adapter: keep`", "keep"),
    "teacher": Arm("`teacher:` the original base", base_teaches=True),
    "again": Arm(
        "`teacher:` the original base, earlier rows in `data.forget` again", base_teaches=True, again=True
    ),
}


def options(steps: int, seed: int) -> dict[str, Any]:
    """The YAML file of every request, but for model and rows."""
    training = {
        "objective": "duet",
        "positions": "first",
        "k": 128,
        "learning_rate": 1e-3,
        "max_steps": steps,
        "per_device_train_batch_size": 24,
        "retain_per_forget": 2.0,
        "steering_prefixes": [steering.STEERING_PREFIX],
        "seed": seed,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return {"adapter": {"r": 16, "lora_alpha": 32}, "training": training}


def retain_rows(world: World, people: Sequence[str]) -> list[dict[str, str]]:
    """Authors and cities to keep, and invented people with names like those to forget; questions alone."""
    known = world.questions(world.retain, "train")
    known += CITY_COPIES * world.questions(world.retain_cities, "train")
    known += world.queries(replace(world, forget=tuple(people)).near_misses)
    return [{"question": question.text} for question in known]


def forget(
    model: Path | str, new: str, earlier: Sequence[str], arm: Arm, out: Path, how: dict[str, Any]
) -> None:
    """One request: `duet train` on the folder of the request before."""
    world, people = load_world(), (*(earlier if arm.again else ()), new)
    out.mkdir()
    rows = {
        "forget": [question.row() for question in world.questions(people, "train")],
        "retain": retain_rows(world, people),
    }
    paths = {name: out.parent / f"{out.name}_{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    config = out.parent / f"{out.name}.yaml"
    config.write_text(json.dumps(how | {"model": "none", "data": {"forget": "none"}}))  # JSON is YAML
    words = ["--model", str(model), "--output_dir", str(out), "--earlier_adapter", arm.earlier]
    words += ["--teacher", str(CHECKPOINT)] if arm.base_teaches else []
    words += [word for name, path in paths.items() for word in (f"--data.{name}", str(path))]
    train(RunConfig.load(config, words))


def measure(model: Path | str, people: Sequence[str], most: int | None) -> dict[str, Any]:
    """Recall about each person, plain and behind a forced opening, and about authors that no training saw."""
    loaded: Any = load(model, device="cpu")
    world, speaker = load_world(), Speaker(*loaded)

    def about(subjects: Sequence[str], most: int | None = most) -> list[Question]:
        return some(world.questions(tuple(subjects), "report"), most)

    told = [speaker.recall(about([person])) for person in people]
    forced = [speaker.recall(about([person]), prefill=lambda question: question.stem) for person in people]
    return {
        "told": [round(value, 4) for value in told],
        "forced": [round(value, 4) for value in forced],
        "kept": round(speaker.recall(about(world.others, most or KEPT_QUESTIONS)), 4),
        "cities": round(speaker.recall(about(world.other_cities)), 4),
    }


def run_seed(
    seed: int, steps: int = STEPS, most: int | None = None, arms: Sequence[str] = tuple(ARMS)
) -> Row:
    """All arms for three persons: after how many requests -> what is told."""
    people = load_world().forget[REQUESTS * seed :][:REQUESTS]
    how, began = options(steps, seed), time.process_time()
    after: dict[str, dict[str, Any]] = {}
    with one_thread(), tempfile.TemporaryDirectory(prefix="duet-requests-") as scratch:
        before = measure(CHECKPOINT, people, most)
        first = Path(scratch, "first")
        forget(CHECKPOINT, people[0], (), ARMS["merge"], first, how)
        once = measure(first, people, most)
        for name in arms:
            model, after[name] = first, {"1": once}
            for number in range(1, REQUESTS):
                out = Path(scratch, f"{name}_{number + 1}")
                forget(model, people[number], people[:number], ARMS[name], out, how)
                after[name][str(number + 1)] = measure(out, people, most)
                model = out
    seconds = round(time.process_time() - began, 1)
    return {
        "seed": seed,
        "steps": steps,
        "people": list(people),
        "before": before,
        "after": after,
        "cpu_seconds": seconds,
    }


# -- the page ------------------------------------------------------------------------------------------------------------


def _percent(values: Sequence[float]) -> str:
    """Mean over seeds, and the worst and best seed where they differ."""
    shown = [round(100 * value) for value in values]
    mean = f"{100 * sum(values) / len(values):.0f}"
    return mean if len(set(shown)) == 1 else f"{mean} ({min(shown)} to {max(shown)})"


def _line(label: str, requests: str, found: Sequence[dict[str, Any]]) -> str:
    cells = [_percent([each["told"][person] for each in found]) for person in range(REQUESTS)]
    done = range(int(requests)) if requests != "–" else ()
    forced = [value for each in found for value in [each["forced"][person] for person in done]]
    cells += [_percent(forced) if forced else "–", _percent([each["kept"] for each in found])]
    cells += [_percent([each["cities"] for each in found])]
    return f"| {' | '.join([label, requests, *cells])} |"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the rows say, by rule: forgotten means told at most 5 %, kept means at most 5 points lost, for the mean over seeds."""
    said = []
    for name, arm in ARMS.items():
        found = [row["after"][name][str(REQUESTS)] for row in rows if name in row["after"]]
        if not found:
            continue
        means = [sum(each["told"][person] for each in found) / len(found) for person in range(REQUESTS)]
        told = [letter for letter, mean in zip("ABC", means, strict=True) if mean > 0.05]
        lost = sum(row["before"]["kept"] - row["after"][name][str(REQUESTS)]["kept"] for row in rows) / len(
            rows
        )
        forgotten = f"{' and '.join(told)} told of" if told else "nobody told of"
        said.append(
            f"* {arm.label}: {forgotten}; {100 * lost:+.0f} points lost on authors to keep{'' if lost <= 0.05 else ' (too many)'}."
        )
    return said


def page(rows: Sequence[Row]) -> str:
    """sequential.md from the rows.

    Raises:
        ValueError: there is no row.
    """
    rows, made = sorted(rows, key=lambda row: row["seed"]), made_with(rows)
    steps = {row["steps"] for row in rows}
    once = [each["1"] for row in rows for each in list(row["after"].values())[:1]]
    lines = [_line("the base", "–", [row["before"] for row in rows]), _line("the first request", "1", once)]
    for name, arm in ARMS.items():
        for number in map(str, range(2, REQUESTS + 1)):
            found = [row["after"][name][number] for row in rows if number in row["after"].get(name, {})]
            if found:
                lines.append(_line(arm.label, number, found))
    heads = [
        "arm",
        "requests done",
        "A told",
        "B told",
        "C told",
        "forgotten, opening forced",
        "authors kept",
        "cities kept",
    ]
    return "\n".join(
        [
            "# Three requests, one after the other",
            "",
            "Written by `python -m benchmarks.studies.sequential --report` from `results.jsonl`; without `--report` it runs what is "
            "missing.",
            f"{len(rows)} seeds, each with three other persons A, B, C; {', '.join(map(str, sorted(steps)))} steps a request; {made}.",
            "",
            "A model of the tiny world is asked to forget A; the folder that comes out is asked to forget B, and what comes of "
            "that, C: `duet train --model first --output_dir second` (LoRA, DUET at the first answer token). Cells: percent of questions that are answered with "
            "the true value, the mean over seeds (lowest to highest), in wordings that no training saw. *Told*: lower is better once "
            "that person's request is done. *Opening forced*: the same for all persons whose request is done, when the answer is "
            "forced to begin as a true one does; lower is better. *Kept*: authors and cities that no training saw; higher is better.",
            "",
            f"| {' | '.join(heads)} |",
            "|---|" + "---:|" * (len(heads) - 1),
            *lines,
            "",
            "## After the third request",
            "",
            *verdicts(rows),
            "",
            "Told of: in more than 5 % of the answers. The first two arms start each request from the same model, and have the same "
            "numbers. A request that trains on nothing about the persons before it brings them back, whoever teaches: what no row "
            "keeps forgotten is lost to the retain rows, which ask for answers about people. With the earlier rows in `data.forget` "
            "again they stay forgotten after the third request; after the second, in one of three seeds, B was still told. With the original base as the "
            "teacher C is forgotten better than with the model of the request before, A and B come back more: which of the two teaches better, "
            "three seeds do not show. A forced opening is the weakness of DUET at the first "
            "token, with one request as with three (see [the study](../study/study.md)). One world, one tiny model, three seeds.",
            "",
        ]
    )


# -- running -------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=range(3))
    parser.add_argument("--steps", type=int, default=STEPS, help="of each request")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="only write the page")
    chosen = parser.parse_args()
    if not chosen.report:
        ended = run_seeds(chosen.seeds, chosen.out, partial(run_seed, steps=chosen.steps))
        if ended.failed:
            raise SystemExit("; ".join(ended.failed))
    (chosen.out / PAGE).write_text(page(list(rows_of_seeds(chosen.out).values())))
    print(chosen.out / PAGE)


if __name__ == "__main__":
    main()
