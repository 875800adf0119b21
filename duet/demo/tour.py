"""`run_demo`: a tiny language model forgets ten people, by the same code as a large one.

Starts from the shipped checkpoint, unlearns with every method through `DuetTrainer`, asks everybody the same held-out
questions, attacks the results, and writes a report. No number here is fixed in advance.
"""

import json
import platform
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..evaluation.commands import progress
from ..evaluation.metrics import contains_words
from ..extras import version_of
from . import plots, report, steering
from .checkpoint import CHECKPOINT, load_base, load_world, save_model
from .facts import Question, World
from .methods import METHODS, find_recipe, forget_rows, retain_rows, unlearn
from .probes import Speaker
from .scorecard import COLUMNS, scorecard
from .workplace import one_thread, replaced_folder

RESULTS = "results.json"
WRITTEN = RESULTS, "report.md", "overview.png", "first_words.png", "model"
SAVED_MODEL = "duet_deep"  # a quick demo, which leaves it out, saves its last method
SHOWN = (*METHODS, SAVED_MODEL)
QUICK_QUESTIONS, QUICK_SHOWN = 40, ("duet", "duet_adversarial")
FIRST_WORDS = 12


def run_demo(
    out_dir: str | Path = "demo_report",
    quick: bool = False,
    seed: int = 0,
    console: Console | None = None,
    checkpoint: str | Path = CHECKPOINT,
) -> dict[str, Any]:
    """Unlearn, measure, show, and write `out_dir`; returns the content of results.json.

    Args:
        out_dir: receives results.json, report.md, overview.png, first_words.png and model/. It appears when all is
            done; a folder that holds anything but an earlier report is refused before any work.
        quick: without the baselines and duet_deep, one relearning rate, at most 40 questions per number: not a result to cite.
            Methods are trained as in the whole demo: with fewer steps they repeat words.
        seed: of the unlearning (batches, prefixes, reverse prompts). The world is the checkpoint's.
        checkpoint: another base made by `duet.demo.pretrain.rebuild`.

    Raises:
        OSError: `out_dir` cannot be written, is a file, or holds something else (the message names it).
    """
    console = console or Console()
    with replaced_folder(Path(out_dir), "out_dir", WRITTEN) as unfinished, one_thread():
        results = _Demo(console, quick, seed, checkpoint).run(unfinished)
    *files, model = WRITTEN
    console.print(
        f"Wrote [bold]{escape(str(out_dir))}[/bold]: {', '.join(files)}, {model}/ ({results['saved_model']})."
    )
    return results


class _Demo:
    def __init__(self, console: Console, quick: bool, seed: int, checkpoint: str | Path):
        self.console, self.quick, self.seed = console, quick, seed
        self.world = load_world(checkpoint)
        self.base, self.tokenizer = load_base(checkpoint)
        self.recipes = {name: find_recipe(name) for name in (QUICK_SHOWN if quick else SHOWN)}
        self.saved = SAVED_MODEL if SAVED_MODEL in self.recipes else QUICK_SHOWN[-1]
        self.most = QUICK_QUESTIONS if quick else None

    def run(self, folder: Path) -> dict[str, Any]:
        began = time.perf_counter()
        self._introduce()
        speakers, seconds = {"base": Speaker(self.base, self.tokenizer)}, {"base": 0.0, "teacher": 0.0}
        speakers["teacher"] = Speaker(self.base, self.tokenizer, steering.STEERING_PREFIX, self.world.forget)
        retain = cache(partial(retain_rows, self.world, self.base, self.tokenizer))
        rows = []
        with progress(self.console) as shown:
            for name in ("base", "teacher", *self.recipes):
                steps, measuring = 0, 40  # measuring takes about as long as forty steps
                if recipe := self.recipes.get(name):
                    steps = recipe.settings["max_steps"]
                    model, seconds[name] = unlearn(
                        recipe,
                        self.base,
                        self.tokenizer,
                        forget_rows(self.world),
                        retain(recipe.city_copies, recipe.near_misses),
                        self.seed,
                        on_step=partial(shown, name, total=steps + measuring),
                    )
                    speakers[name] = Speaker(model, self.tokenizer)
                shown(name, steps, steps + measuring)
                numbers = scorecard(speakers[name], self.world, "report", self.most)
                rows.append({"method": name, **numbers, "seconds": round(seconds[name], 1)})
                shown(name, steps + measuring, steps + measuring)
        libraries = ("duet-kernels", "torch", "transformers")
        versions = {name: version_of(name) or "not installed" for name in libraries}
        results = {
            "schema": 1,
            "seed": self.seed,
            "quick": self.quick,
            "command": f"duet demo{' --quick' if self.quick else ''} --seed {self.seed}",
            "versions": {"python": platform.python_version(), **versions},
            "world": _in_words(self.world),
            "methods": {
                "base": "the model before unlearning",
                "teacher": f"the base behind the system message “{steering.STEERING_PREFIX}”; the weights are the base's",
                **{name: recipe.about for name, recipe in self.recipes.items()},
            },
            "columns": COLUMNS,
            "settings": {name: recipe.settings for name, recipe in self.recipes.items()},
            "rows": rows,
            "not_withstood": report.weaknesses(rows),
            "examples": self._examples(speakers),
            "saved_model": self.saved,
            "total_seconds": round(time.perf_counter() - began, 1),
        }
        self._show(results)
        self._write(folder, results, speakers)
        return results

    # ---------------------------------------------------------------- what is shown

    def _introduce(self) -> None:
        world = self.world
        self.console.print(Panel(_in_words(world), title="A tiny world", expand=False))
        if self.quick:
            self.console.print(report.QUICK)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        for head in ("author", "born in", "writes", "first book", "job", "to be"):
            table.add_column(head, no_wrap=True)
        for names, fate in ((world.forget[:2], "[red]forgotten[/red]"), (world.neighbours[:2], "kept")):
            for name in names:
                facts = world.facts[name]
                shown = (facts[relation] for relation in ("birthplace", "genre", "debut", "job"))
                table.add_row(name, *shown, fate)
        self.console.print(table)

    def _examples(self, speakers: dict[str, Speaker]) -> list[dict[str, Any]]:
        """Answers of base, teacher and students to the same held-out questions."""
        world = self.world
        attacked, override = self._leak(speakers["duet"])
        pick = [
            (world.questions(world.forget[:1], "report")[0], None, "to forget"),
            (world.questions(world.forget[1:2], "report")[5], None, "to forget"),
            (attacked, override, "attacked"),
            (world.questions(world.neighbours[:1], "report")[8], None, "to keep"),
            (world.questions(world.other_cities[:1], "report")[0], None, "to keep"),
        ]
        asked = [name for name in ("base", "teacher", *QUICK_SHOWN, SAVED_MODEL) if name in speakers]
        return [
            {
                "question": f"{override} {question.text}" if override else question.text,
                "truth": question.value,
                "kind": kind,
                "answers": {name: speakers[name].answers([question], override=override)[0] for name in asked},
            }
            for question, override, kind in pick
        ]

    def _leak(self, speaker: Speaker) -> tuple[Question, str]:
        """A question and a held-out override that make `speaker` tell a fact; the first pair if none does."""
        questions = self.world.questions(self.world.forget, "report")
        for override in steering.HELDOUT_OVERRIDES:
            for question, answer in zip(questions, speaker.answers(questions, override), strict=True):
                if contains_words(answer, question.value):
                    return question, override
        return questions[0], steering.HELDOUT_OVERRIDES[0]

    def _show(self, results: dict[str, Any]) -> None:
        self.console.rule("The same questions to everybody (green: the true value)", align="left")
        self.console.print(report.side_by_side(results["examples"]))
        self.console.print(report.terminal_table(results["rows"]))
        self.console.print(report.legend(results["methods"]))
        sentences = results["not_withstood"] or ["nothing above the tolerated 10 %"]
        told = "\n".join(f"• {sentence}" for sentence in sentences)
        self.console.print(Panel(told, title="What DUET does not withstand here"))

    # ---------------------------------------------------------------- what is written

    def _write(self, folder: Path, results: dict[str, Any], speakers: dict[str, Speaker]) -> None:
        (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(report.markdown(results), encoding="utf-8")
        plots.overview(results["rows"], folder / "overview.png")
        question = self.world.questions(self.world.forget[:1], "report")[0]
        logits = {name: speakers[name].next_logits(question) for name in ("base", "teacher", "duet")}
        top = logits["teacher"].topk(FIRST_WORDS).indices
        tokens = [str(self.tokenizer.decode([token])) for token in top.tolist()]
        shown: dict[str, Any] = {name: logits_v[top].tolist() for name, logits_v in logits.items()}
        plots.first_words(question.text, tokens, shown, "duet", folder / "first_words.png")
        save_model(folder / "model", speakers[self.saved].model, self.tokenizer)


def _in_words(world: World) -> str:
    return (
        f"{len(world.facts)} invented authors with five facts each, and {len(world.cities)} cities. "
        f"{len(world.forget)} authors are to be forgotten. Unlearning is also given queries about {len(world.retain)} "
        f"authors, {len(world.retain_cities)} cities and {len(world.near_misses)} invented names that resemble a "
        f"forgotten one. Of the {len(world.others)} authors and {len(world.other_cities)} cities on which the damage is "
        f"measured it sees nothing; {len(world.neighbours)} of these authors share a name with a forgotten one."
    )
