"""What `duet report` is made of: first tokens of two models, figures, neighbours by nearness, Markdown."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from tiny_models import tiny, word_tokenizer

from duet.evaluation.report import figures
from duet.evaluation.report.figures import Estimate, Point
from duet.evaluation.report.neighbours import neighbours_section
from duet.evaluation.report.page import Cell, Chart, Grid, Section, markdown
from duet.evaluation.report.runs import Inputs, Method, read_inputs
from duet.evaluation.report.topk import compare_topk


def test_answers_are_no_markdown():
    said = "**no** _x_ a_b __init__ `c` [d](e) $f$ ~~g~~ \\| &lt; <h>"
    text = markdown(
        "",
        [Section("a", "A", blocks=[Grid(["", "my_model*"], [[Cell("q"), Cell(said, mark="leaks")]])])],
        Path(),
    )
    shown = r"\*\*no\*\* \_x\_ a_b \_\_init\_\_ \`c\` \[d\](e) \$f\$ \~\~g\~\~ \\\| \&lt; &lt;h>"
    assert f"| q | **leaks:** {shown} |" in text and r"|  | my_model\* |" in text


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\x85", "\u2028"])
def test_the_end_of_a_line_ends_no_cell_and_no_caption(end):
    said = f"a{end}b"
    blocks = [Grid([said], [[Cell(said)]], caption=said), Chart(said, "<svg ></svg>", f"*{said}*")]
    blocks.append(Grid([said], [[Cell(said)]], caption=said, folded=True))
    lines = markdown(said, [Section("a", "A", [said], blocks, {"c": said})], Path("figures")).splitlines()
    assert lines.count("| a<br>b |") == 4 and lines.count("a b") == 2 and "**a b**" in lines
    assert r"![\*a b\*](figures/a-b.svg)" in lines and r"*\*a b\**" in lines
    assert "* `c`: a b" in lines and "<summary>a b</summary>" in lines


def test_top_k_against_the_models_own_log_probabilities():
    before, after, tokenizer = tiny(), tiny(seed=1), word_tokenizer()
    (told,) = compare_topk(before, after, tokenizer, ["who is ada ?"], k=4, instruction="you know nothing .")
    chat = [{"role": "user", "content": "who is ada ?"}]

    def logprobs(model, messages):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            return model.double()(**ids).logits[0, -1].log_softmax(-1)

    steered = [{"role": "system", "content": "you know nothing ."}, *chat]
    cases = {
        "before": logprobs(before, chat),
        "after": logprobs(after, chat),
        "teacher": logprobs(before, steered),
    }
    for name, wanted in cases.items():
        assert told[name] == pytest.approx(wanted[told["ids"]].tolist(), abs=1e-4)
    for name in ("before", "after"):
        assert set(cases[name].topk(4).indices.tolist()) <= set(told["ids"])
    assert told["before"] == sorted(told["before"], reverse=True) and len(told["ids"]) <= 8
    with pytest.raises(ValueError, match="after: wanted the vocabulary of before, 128 ids, got 100"):
        compare_topk(tiny(), tiny(vocab_size=100), tokenizer, ["who is ada ?"])


def test_figures_are_clean_svg():
    curve = [(1, Estimate(0.1, 0.0, 0.2)), (5, None), (9, Estimate(0.9, 0.8, 1.0))]
    drawn = [
        figures.frontier([Point("a$b", Estimate(0.2, 0.1, 0.3), Estimate(0.9)), Point("c", Estimate(0.4), Estimate(1.0))], "x", "y"),
        figures.relearning({"1e-05": [(1, None)], "0.001": curve}, "npo", start=0.05),
        figures.topk("q", ["Paris", " a", "\n"], [3.0, 1.0, -1.0], [1.0, 2.0, 0.5]),
    ]  # fmt: skip
    ids = []
    for svg in drawn:
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg") and "currentColor" in svg and "metadata" not in svg
        ids += re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids)), "figures on one page do not share ids"
    assert "a$b" in drawn[0] and "0.001 (worst)" in drawn[1] and "'\\n'" in drawn[2]


def test_labels_do_not_touch():
    places = figures._spread([0.5, 0.5, 0.52, 0.9], 0.1)
    assert all(b - a > 0.0999 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
    assert sum(places[:3]) == pytest.approx(1.52)


def numbers_of(svg):
    """Centre of each numbered label of the frontier, in points."""
    places = []
    for group in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        if re.search(r"number-\d+$", group.get("id", "")):
            text = next(group.iter("{http://www.w3.org/2000/svg}text"))
            at = re.search(r"translate\(([\d.]+) ([\d.]+)\)", text.get("transform", ""))
            x, y = at.groups() if at else (text.get("x"), text.get("y"))
            places.append((float(x), float(y)))
    return places


@pytest.mark.parametrize("count", [7, 14])
def test_labels_of_the_frontier_do_not_overlap(count):
    """As in the demo: all but one forget everything and keep almost everything."""
    points = [
        Point(f"a rather long name of method {i} " * 3, Estimate(0.0), Estimate(1 - 0.005 * i))
        for i in range(count - 1)
    ]
    svg = figures.frontier([*points, Point("base", Estimate(1.0), Estimate(1.0), True)], "x", "y")
    places = numbers_of(svg)
    assert len(places) == count
    for i, (x, y) in enumerate(places):
        assert all(abs(x - a) > 7 or abs(y - b) > 9 for a, b in places[:i]), i
    wide = float(re.search(r'viewBox="0 0 ([\d.]+)', svg).group(1))
    assert 340 < wide < 380 and all(0 < x < wide for x, _ in places)
    assert all(f"{i + 1}  a rather" in svg for i in range(count - 1)), "the legend names each number"


def test_captions_say_what_is_drawn():
    bare = [Point("a", Estimate(0.1), Estimate(0.9)), Point("b", Estimate(0.2), Estimate(0.8))]
    assert figures.frontier_caption(bare, "x", "y") == "x against y, when asked without an attack."
    assert "stroke-dasharray" not in figures.frontier(bare, "x", "y")
    full = [
        bare[0],
        Point("c", Estimate(0.3, 0.2, 0.4), Estimate(1.0)),
        Point("base", Estimate(1.0), Estimate(1.0), True),
    ]
    assert figures.frontier_caption(full, "x", "y").endswith(
        "Bars: 95 % intervals; grey: not trained to forget; dotted line: the methods that no other beats in both."
    )
    assert "stroke-dasharray" in figures.frontier(full, "x", "y")
    assert "dotted" not in figures.frontier_caption(full, "x", "y", ("", "↑")), "no direction, no front"
    turned = figures.frontier(bare, "refusal", "y", ("↑", "↑"))
    assert "forgets more →" in turned and "← forgets more" in figures.frontier(bare, "recall", "y")
    assert "Dotted line" in figures.frontier_caption(bare, "refusal", "y", ("↑", "↑")), (
        "b refuses more, a keeps more"
    )
    curves = {"0.1": [(1, Estimate(0.5))]}
    assert figures.relearning_caption(curves) == "One line a learning rate, the worst bold."
    curves = {"0.1": [(1, Estimate(0.5, 0.4, 0.6))]}
    assert figures.relearning_caption(curves, 0.0).endswith(
        "with its 95 % interval; dotted: all rows, asked before."
    )


def test_a_shift_of_all_logits_changes_no_first_token():
    model = tiny()
    head = model.get_output_embeddings()
    with torch.no_grad():
        model.set_output_embeddings(torch.nn.Linear(head.in_features, head.out_features, bias=True))
        shifted = model.get_output_embeddings()
        shifted.weight.copy_(head.weight)
        shifted.bias.fill_(5.0)
    (told,) = compare_topk(tiny(), model, word_tokenizer(), ["who is ada ?"], k=4)
    assert told["after"] == pytest.approx(told["before"], abs=1e-4) and max(told["before"]) < 0


def test_logits_of_an_earlier_version_are_refused(tmp_path):
    (tmp_path / "topk.json").write_text(json.dumps({"before": "a", "after": "b", "queries": []}))
    with pytest.raises(
        ValueError, match=r"topk.json has no 'measure'; wanted what this version of duet writes"
    ):
        read_inputs([str(tmp_path)])


@pytest.mark.parametrize("status", ["ok", "cut", "empty"])
def test_what_is_kept_by_how_near_it_is(status):
    """Of what the base told: Spain, near to France, is lost; Iron, far from it, is kept; what the base missed is in no row."""
    truths = {
        "capital of france ?": "paris",
        "capital of spain ?": "madrid",
        "symbol : iron": "fe",
        "gold": "au",
    }

    def method(label, role, said):
        answers = {}
        for i, (question, value) in enumerate(truths.items()):
            task = "retain_answers" if i else "forget_answers"
            row = {
                "question": question,
                "answer": value,
                "value": value,
                "generated": said[i],
                "status": status,
            }
            answers["s", task, i, question] = row
        return Method(label, role, answers=answers)

    base = method("base", "base", ["paris", "madrid", "fe", "ag"])
    student = method("ours", "student", ["no", "no", "it is fe", "au"])
    section = neighbours_section(Inputs([base, student], []))
    (grid,) = section.blocks
    assert [[cell.text for cell in row] for row in grid.rows] == [
        ["0 to 0.25", "1.00", "1.00"],
        ["0.5 to 0.75", "1.00", "0.00"],
    ]
    assert grid.rows[1][2].interval == "0.00 to 0.79, 1 row"
    (grid,) = neighbours_section(Inputs([student], [])).blocks
    assert [row[1].interval.split(", ")[1] for row in grid.rows] == ["2 rows", "1 row"]
    assert neighbours_section(Inputs([Method("ours")], [])).notes[0].startswith("No neighbours:")
