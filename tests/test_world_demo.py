"""The quick demo from end to end: what it writes, and that the written model has forgotten."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from duet.demo import plots, probes, tour
from duet.demo.checkpoint import load_world
from duet.demo.methods import find_recipe
from duet.demo.report import HEADINGS, markdown, side_by_side, terminal_table
from duet.demo.scorecard import COLUMNS

ROOT = Path(__file__).parents[1]
ROW = {
    "method",
    "forget_recall",
    "forget_refusal",
    "retain_recall",
    "neighbour_recall",
    "reverse_prompt_recall",
    "reverse_prompt_heldout_recall",
    "prefill_recall",
    "relearn_recall",
    "int8_forget_recall",
    "int4_forget_recall",
    "seconds",
}


@pytest.fixture
def committed():
    return json.loads((ROOT / "benchmarks/results/demo/results.json").read_text())


def test_a_number_is_rounded_one_way(committed, tmp_path, monkeypatch):
    """0.975 and 0.995 in the README's block, the terminal, report.md and the picture."""
    rows = committed["rows"]
    assert {0.975, 0.995} <= {row["retain_recall"] for row in rows}
    table = terminal_table(rows)
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    plots.overview(rows, tmp_path / "overview.png")
    texts = [[text.get_text() for text in axis.texts] for axis in drawn[0].axes]
    for i, row in enumerate(rows):
        wanted = {c: f"{100 * float(f'{row[c]:.2f}'):.0f}" for c in COLUMNS}
        cells = [list(column.cells)[i] for column in table.columns]
        assert cells[1:-1] == [wanted[c] for c in HEADINGS]
        line = next(x for x in markdown(committed).splitlines() if x.startswith(f"| {row['method']} |"))
        assert line.split(" | ")[1:-1] == list(wanted.values())
        for found, (_, _, columns) in zip(texts, plots.PANELS, strict=True):
            assert found[i * len(columns) : (i + 1) * len(columns)] == [wanted[c] for c in columns]


def test_an_answer_is_shown_as_it_was_said():
    """Nothing in it is markup, nor obeyed by a terminal."""
    said = {"base": "[/] [bold]in Rome[/bold] :smile:", "duet": "[red]no[/red] \x1b[2J"}
    example = {"kind": "[to] forget", "question": "who [is] [/x] ?", "truth": "Rome", "answers": said}
    shown = Console(file=io.StringIO(), width=100)
    shown.print(side_by_side([example]))
    lines = [" ".join(line.split()) for line in shown.file.getvalue().splitlines()]
    assert lines[1:] == ["[to] forget who [is] [/x] ?", f"base {said['base']}", r"duet [red]no[/red] \x1b[2J"]


@pytest.mark.slow
def test_quick_demo(tmp_path, monkeypatch):
    """With half of the rows of a step, which the tuned settings forgive."""
    monkeypatch.setattr(tour, "find_recipe", lambda name: replace(find_recipe(name), forget_per_step=8))
    out = tmp_path / "demo_report"
    with open(tmp_path / "shown.txt", "w") as shown:
        returned = tour.run_demo(out_dir=out, quick=True, seed=1, console=Console(file=shown, width=160))
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))

    assert (results["schema"], results["seed"], results["quick"]) == (1, 1, True)
    assert {"torch", "transformers", "duet-kernels"} <= set(results["versions"])
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["base", "teacher", "duet", "duet_adversarial"]
    for row in rows.values():
        assert set(row) >= ROW
        assert all(0 <= row[column] <= 1 for column in COLUMNS)
    assert rows["base"]["forget_recall"] > 0.9 and rows["teacher"]["forget_refusal"] > 0.9
    for method in ("duet", "duet_adversarial"):
        assert rows[method]["forget_recall"] < 0.3
        assert rows[method]["forget_refusal"] > 0.6
        assert rows[method]["retain_recall"] > 0.8 and rows[method]["stutter"] < 0.6
    assert rows["duet_adversarial"]["reverse_prompt_recall"] < rows["duet"]["reverse_prompt_recall"]

    assert {path.name for path in out.iterdir()} == {
        "results.json", "report.md", "overview.png", "first_words.png", "model",
    }  # fmt: skip
    written = (out / "report.md").read_text()
    assert all(sentence in written for sentence in results["not_withstood"])
    said = (tmp_path / "shown.txt").read_text()
    for name in rows:
        assert re.search(rf"^{name}: (\d+) of \1, \d+ s$", said, re.MULTILINE), "no terminal: a line a method"
    wrote = said[said.index("Wrote ") :]
    assert all(path.name in wrote for path in out.iterdir())
    assert results["saved_model"] == "duet_adversarial" and "model/ (duet_adversarial)" in wrote
    assert tour.SAVED_MODEL == "duet_deep"

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    questions = load_world().questions(load_world().forget, "report")
    answers = probes.Speaker(model, tokenizer).answers(questions)
    assert probes.recall(answers, questions) < 0.3
