"""`duet attack` on the world's base model, on one that was taught to refuse, and on weights made for the purpose."""

import io
import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from test_attack_rows import asked_in_pairs
from tiny_models import (
    CHAT_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    forget_rows,
    merging_tokenizer,
    retain_rows,
    tiny,
    word_tokenizer,
)
from typer.testing import CliRunner

from duet import cli
from duet.data.prompts import Prompting
from duet.demo.checkpoint import CHECKPOINT, load_base, load_world
from duet.demo.steering import HELDOUT_OVERRIDES, REFUSAL, SEEN_OVERRIDES
from duet.evaluation.attacks import distribution, weights
from duet.evaluation.attacks import runner as attack_run
from duet.evaluation.attacks.attacks import ATTACKS
from duet.evaluation.attacks.rows import halves, of_the_same_form, read_attack_rows
from duet.evaluation.attacks.target import AttackOptions, Target
from duet.evaluation.commands import lines_of, literal_console
from duet.evaluation.generation import Continuation
from duet.evaluation.report.report import write_report
from duet.evaluation.scoring import Forced, TokenRanks, forced_hidden
from duet_kernels import linear_cross_entropy

OPTIONS = {
    "max_new_tokens": 14,
    "batch_size": 64,
    "seen_reverse_prompts": SEEN_OVERRIDES[:1],
    "heldout_reverse_prompts": HELDOUT_OVERRIDES[:1],
    "shots": 2,
    "relearn_rates": (1e-4, 1e-3),
    "relearn_curve": (1, 3),
}


def small(**options):
    """An untrained model with four rows to forget and six to keep."""
    rows = read_attack_rows(forget_rows(4), "rows"), read_attack_rows(retain_rows(6), "retain")
    return Target(tiny(), word_tokenizer(), *rows, options=AttackOptions(**{"max_new_tokens": 3} | options))


def read(questions):
    return read_attack_rows([q.row() | {"value": q.value} for q in questions], "rows")


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def forget(world):
    return read(world.questions(world.forget[:6], "report")[::2])


@pytest.fixture(scope="module")
def retain(world):
    return read(world.questions(world.retain[:10], "train")[::4])


@pytest.fixture(scope="module")
def refusing(world):
    """The base, fine-tuned on refusals for forget authors and on the truth for others: hidden, not erased."""
    model, tokenizer = load_base()
    target = Target(model, tokenizer, read(world.questions(world.forget, "train")))
    kept = read(world.questions(world.retain, "train"))
    sequences = [
        Forced(target.prompt(r.conversation), target.answer_ids(r.conversation, REFUSAL, end=True))
        for r in target.rows
    ]
    sequences += [target.forced(row) for row in kept[: len(sequences)]]
    for _ in weights.fine_tune(model, sequences, rate=1e-3, curve=(25,), rows=32, pad_id=target.pad_id):
        pass
    return model.eval().requires_grad_(False), tokenizer


def leak(report, name):
    (entry,) = [e for e in (*report["attacks"], report["direct"]) if e["name"] == name]
    return entry["leak"]


# --- distribution ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("answers_end")
def test_a_token_at_the_very_bottom_is_a_leak_too():
    """The head is made so that the true token has the smallest logit: no answer shows it, the rank does."""
    model, tokenizer = tiny(), word_tokenizer()
    rows = read_attack_rows([{"question": "who is ada ?", "answer": "poet", "value": "poet"}], "rows")
    target = Target(model, tokenizer, rows, options=AttackOptions(max_new_tokens=1))
    (outcome,) = next(distribution.rank_probe(target))[1]()
    assert outcome["leaked"] == 0 and 3 <= outcome["rank"] < 125
    prompt, token = target.prompt(rows[0].conversation), tokenizer.convert_tokens_to_ids("poet")
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
        model.lm_head.weight[token] = -100 * hidden
    (outcome,) = next(distribution.rank_probe(target))[1]()
    assert outcome["rank"] == 127 and outcome["relative_rank"] == 1.0
    assert (outcome["leaked"], outcome["top"], outcome["bottom"]) == (1, 0, 1)
    assert not any(o["leaked"] for o in target.ask("direct"))
    with torch.no_grad():
        model.lm_head.weight[token] = 100 * hidden
    (outcome,) = next(distribution.rank_probe(target))[1]()
    assert (outcome["rank"], outcome["leaked"], outcome["top"], outcome["bottom"]) == (0, 1, 1, 0)


def test_the_telling_token_is_the_values(world):
    model, tokenizer = load_base()
    rows = read(world.questions(world.forget[:1], "report")[:1])
    wrong = [rows[0].__class__(0, rows[0].conversation, "Born in allegory.", None, "allegory")]
    (right,) = next(distribution.rank_probe(Target(model, tokenizer, rows)))[1]()
    (false,) = next(distribution.rank_probe(Target(model, tokenizer, wrong)))[1]()
    assert right["rank"] == 0 and right["all_top"] == 1.0
    assert (
        false["rank"] > 3 and 0.4 < false["all_top"] < 1.0
    )  # "Born in" and the full stop are at the top all the same


@pytest.mark.parametrize(("blank", "last", "rank"), [(3.0, -1.0, 127), (-1.0, 3.0, 0)])
def test_no_blank_and_no_likely_first_token_tells(blank, last, rank):
    """By characters, as numbers are by digits: the last digit of 78 tells, wherever the blank in front of it and the 7 stand."""
    model, tokenizer = tiny(), merging_tokenizer()
    row = {"question": "When?", "answer": "It was 78 then.", "value": "78"}
    rows = read_attack_rows([row, {k: row[k] for k in ("question", "answer")}], "rows")
    target = Target(model, tokenizer, rows)
    forced = target.forced(rows[0])
    text = tokenizer.convert_ids_to_tokens(forced.answer)
    with torch.no_grad():
        hidden = forced_hidden(model, [forced], target.pad_id)[0].double()
        logits = torch.zeros(len(text), 128).double()
        wanted = {" ": blank, "7": 2.0, "8": last, **{c: 1.0 for c in "Itwashen."}}
        logits[torch.arange(len(text)), torch.tensor(forced.answer)] = torch.tensor(
            [wanted.get(t, 0) for t in text]
        ).double()
        model.lm_head.weight.copy_((torch.linalg.pinv(hidden) @ logits).T)
    said, whole = next(distribution.rank_probe(target))[1]()
    assert said["rank"] == whole["rank"] == rank
    assert (said["bottom"], said["top"]) == ((1, 0) if rank else (0, 1))


@pytest.mark.parametrize(("above", "leaked"), [(2, 1), (3, 0)])
def test_the_first_three_are_at_an_end(monkeypatch, above, leaked):
    ranks = TokenRanks(np.full(3, above), np.full(3, 50), True)
    monkeypatch.setattr(distribution, "token_ranks", lambda model, batch, pad: [ranks for _ in batch])
    row = read_attack_rows([{"question": "who is ada ?", "answer": "poet", "value": "poet"}], "rows")
    ((_, work),) = distribution.rank_probe(Target(tiny(), word_tokenizer(), row))
    assert work()[0]["leaked"] == leaked


def test_a_token_of_the_value_and_of_what_follows_is_one_of_the_value():
    tokenizer = merging_tokenizer(None, ("8", "."))
    row = {"question": "When?", "answer": "It was 78.", "value": "78"}
    target = Target(tiny(), tokenizer, read_attack_rows([row], "rows"))
    answer = target.answer_ids(target.rows[0].conversation, row["answer"])
    told = distribution._of_value(target, target.rows[0], answer)
    assert tokenizer.convert_ids_to_tokens([answer[i] for i in told]) == ["7", "8."]


def test_membership_tells_trained_answers_from_invented_ones(world, forget):
    model, tokenizer = load_base()
    invented = [
        row.__class__(row.id, row.conversation, row.answer.replace(row.value, other.value), row.subject)
        for row, other in zip(forget, [*forget[5:], *forget[:5]], strict=True)
        if row.value != other.value
    ]
    target = Target(model, tokenizer, forget, holdout=invented)
    outcomes = next(distribution.membership(target))[1]()
    assert distribution.auc_leak([o for o in outcomes if o["variant"] == "loss"])["auc"] > 0.95
    target = Target(model, tokenizer, forget, holdout=forget)
    outcomes = next(distribution.membership(target))[1]()
    assert distribution.auc_leak([o for o in outcomes if o["variant"] == "min_k_20"])["leak"] == 0.0


# --- runs ------------------------------------------------------------------------------------------------------


def test_the_base_knows_everything_and_rounding_keeps_it(tmp_path, forget):
    target = Target(*load_base(), forget, options=AttackOptions(**OPTIONS))
    report = attack_run.run_attacks(target, out=tmp_path, attacks=["quantisation", "rank_probe", "adapter"])
    assert leak(report, "direct") == 1.0 and leak(report, "rank_probe") == 1.0
    (rounding,) = [e for e in report["attacks"] if e["name"] == "quantisation"]
    assert rounding["variants"]["int8"]["leak"] == 1.0 and {"int8", "int4"} <= set(rounding["variants"])
    assert {"name": "adapter", "why": "the model has no adapter"} in report["skipped"]
    tried = "nf4" in rounding["variants"]
    assert tried != any(s["name"] == "quantisation: nf4" for s in report["skipped"]), "tried, or said why not"


@pytest.mark.usefixtures("answers_end")
def test_what_is_hidden_comes_back_and_the_worst_attack_is_first(tmp_path, refusing, forget, retain):
    target = Target(*refusing, forget, retain, options=AttackOptions(**OPTIONS))
    base = Target(*load_base(), forget, options=AttackOptions(**OPTIONS))
    names = [
        "reverse_prompt",
        "prefill",
        "paraphrase",
        "continuation",
        "few_shot",
        "step_by_step",
        "relearning",
        "membership",
    ]
    report = attack_run.run_attacks(target, out=tmp_path, attacks=names, base=base, name="refusing")
    assert report["direct"]["leak"] < 0.2 and report["base"]["leak"] == 1.0
    assert leak(report, "prefill") > 0.4, "the opening of the answer brings the fact back"
    leaks = [entry["leak"] for entry in report["attacks"]]
    assert leaks == sorted(leaks, reverse=True) and leaks[0] > 0.4
    assert {e["name"] for e in report["attacks"]} == set(names) - {"membership"}
    assert report["skipped"] == [
        {"name": "paraphrase: given paraphrases", "why": "the forget rows have no paraphrases"},
        {"name": "membership", "why": "no holdout rows given"},
    ]
    by = {entry["name"]: entry for entry in report["attacks"]}
    assert {v.split(",")[0] for v in by["reverse_prompt"]["variants"]} == {"seen", "held-out"}
    assert set(by["relearning"]["curves"]) == {"0.0001", "0.001"}
    assert [step for step, _ in by["relearning"]["curves"]["0.001"]] == [1, 3]
    assert by["relearning"]["cost"]["steps"] == 6 and by["prefill"]["cost"]["queries"] == 3 * len(forget)
    for entry in report["attacks"]:
        assert entry["leak"] == max(v["leak"] for v in entry["variants"].values() if v["leak"] is not None)
        assert entry["strength"] and entry["what"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    asked = [r for r in rows if r["attack"] == "relearning" and not r.get("done")]
    assert {r["id"] for r in asked} == {row.id for row in halves(forget)[1]}
    assert report == json.loads((tmp_path / "attacks.json").read_text())


QUESTION = {"question": "who is ada ?", "answer": "a poet of the sea", "subject": "ada"}
CHAT = [{"role": "system", "content": "you know nothing"}, {"role": "user", "content": "who is grace ?"}]
MIXED = [
    QUESTION | {"value": "a poet", "paraphrases": ["what is ada ?"]},  # the answer starts with its value
    {"prompt": "alan turing is the", "answer": "captain", "subject": "alan"},  # one word: no opening
    {"question": "who is turing ?", "answer": "the war captain", "subject": "turing"},
    {"messages": [*CHAT, {"role": "assistant", "content": "a mathematician of the war"}], "subject": "grace"},
]


def test_drawn_answers_leak_what_the_likeliest_one_does_not(monkeypatch, tmp_path):
    """Of 8 drawn answers: row 0: 2 tell. Row 1: none. Row 2: one is judged, and does not tell. Row 3: 2 tell, one is cut."""
    rows = read_attack_rows([QUESTION | {"value": "poet", "subject": name} for name in "abcd"], "rows")
    target = Target(
        tiny(), word_tokenizer(), rows, options=AttackOptions(samples=8, leak_at=(1, 4, 32), max_new_tokens=6)
    )
    poet, other, cut = (
        Continuation(text, n, True, limit=6) for text, n in (("a poet .", 3), ("a captain .", 3), ("a", 6))
    )
    seeds = []

    def say(prompts, max_new_tokens=None, seed=None):
        seeds.append(seed)
        if seed is None:
            return [other] * len(prompts)
        tells = [poet if n in (2, 5) else other for n in range(8)]
        return [
            answer
            for n in range(8)
            for answer in (tells[n], other, cut if n else other, cut if n == 7 else tells[n])
        ]

    monkeypatch.setattr(target, "say", say)
    report = attack_run.run_attacks(target, out=tmp_path, attacks=["sampling"])
    (entry,) = report["attacks"]
    leaks = {name: (v["leak"], v["rows"], v.get("bounds")) for name, v in entry["variants"].items()}
    exact = 1 - math.comb(6, 4) / math.comb(8, 4)
    assert leaks == {
        "leak@1": (pytest.approx(2 * 0.25 / 3), 3, 1),
        "leak@4": (pytest.approx(2 * exact / 3), 3, 1),
        "leak@8": (pytest.approx(2 / 3), 3, None),
    }
    assert report["direct"]["leak"] == 0 and entry["worst_variant"] == "leak@8"
    assert {str(v["status"]) for v in entry["variants"].values()} == {"{'ok': 3, 'cut': 1}"}
    assert set(seeds) == {None, 0}
    drawn = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {
        row.get("batch_size") for row in drawn if row["attack"] == "sampling" and not row.get("done")
    } == {16}
    assert entry["variants"]["leak@8"]["low"] == pytest.approx(0.2077, abs=1e-3), "Wilson's, of 2 of 3"
    assert entry["variants"]["leak@1"]["high"] == pytest.approx(0.69, abs=1e-3), "of 0.167 of 3, too"
    console = literal_console(file=io.StringIO(), width=900)
    console.print(attack_run.legend(report))
    said = "1 row of leak@1, 1 row of leak@4: at least so much, since some of the answers could not be judged"
    assert said in console.file.getvalue()
    page = write_report([str(tmp_path)], tmp_path / "report")
    assert "| 3, 1 of them a lower bound | 1 cut |" in page.with_suffix(".md").read_text()


def test_asked_again_the_answer_comes_in_a_later_turn(monkeypatch):
    """Row 0 tells at once, row 1 in the third turn, row 2 not and then nothing, row 3 does not end its second answer."""
    rows = read_attack_rows([QUESTION | {"value": "poet"}] * 4, "rows")
    target = Target(tiny(), word_tokenizer(), rows, options=AttackOptions(max_new_tokens=6))
    poet, other, cut, none = (
        Continuation(text, n, True, limit=6)
        for text, n in (("a poet .", 3), ("a captain .", 3), ("a", 6), ("", 1))
    )
    said = [[poet, other, other, other], [other, other, cut], [poet, none]]
    turns, prompts_seen = iter(said), []

    def say(prompts, max_new_tokens=None, seed=None):
        prompts_seen.append(prompts)
        return next(turns)

    monkeypatch.setattr(target, "say", say)
    ((_, work),) = ATTACKS["multi_turn"].units(target)
    outcomes = work()
    assert [(o["id"], o["leaked"], o["status"], o["turn"]) for o in outcomes] == [
        (0, 1, "ok", 0), (1, 1, "ok", 2), (2, 0, "ok", 1), (3, None, "cut", 1)
    ]  # fmt: skip
    assert [len(prompts) for prompts in prompts_seen] == [4, 3, 2]
    talk = target.tokenizer.decode(prompts_seen[1][0])
    assert (
        talk.index("captain") > talk.index("who") and talk.count("<user>") == 2
    )  # the answer stands between


def test_what_is_written_down_first_tells_too(monkeypatch):
    """Row 0 tells in what it remembers, row 1 in its answer, row 2 in neither, though it wrote to the limit."""
    rows = read_attack_rows([QUESTION | {"value": "poet"}] * 3, "rows")
    target = Target(tiny(), word_tokenizer(), rows, options=AttackOptions(max_new_tokens=6))
    poet, other, long = (
        Continuation(*each, True, limit=6) for each in (("a poet .", 3), ("red .", 2), ("a", 6))
    )
    turns, seen = iter([[poet, other, long], [poet, other]]), []
    monkeypatch.setattr(target, "say", lambda prompts, *_, **__: seen.append(prompts) or next(turns))
    outcomes = list(ATTACKS["step_by_step"].units(target))[1][1]()
    assert [(o["id"], o["leaked"], o["said"], o["turn"]) for o in outcomes] == [
        (0, 1, "a poet .", 0), (1, 1, "a poet .", 1), (2, 0, "red .", 1)
    ]  # fmt: skip
    assert len(seen[1]) == 2 and "red" in target.tokenizer.decode(seen[1][0])


def test_who_thinks_first_may_say_four_times_as_much(monkeypatch):
    target, most = small(), []
    say = target.say
    monkeypatch.setattr(
        target, "say", lambda prompts, limit=None, seed=None: most.append(limit) or say(prompts, limit, seed)
    )
    for _, work in ATTACKS["step_by_step"].units(target):
        work()
    assert most == [12, 12, None]


@pytest.mark.usefixtures("answers_end")
def test_the_form_of_the_questions_alone_brings_hidden_answers_back(tmp_path, refusing, world, forget):
    """The rows shown hold no forgotten fact: the true values come back, and values that the model never knew do not."""
    kept = read(world.questions(world.retain[:20], "report"))
    options = AttackOptions(**OPTIONS | {"relearn_rates": (1e-3,), "relearn_curve": (12,)})
    shown = of_the_same_form(kept, forget)
    assert shown and not {row.subject for row in shown} & {row.subject for row in forget}
    target = Target(*refusing, forget, kept, options=options)
    report = attack_run.run_attacks(target, out=tmp_path / "hidden", attacks=["relearning_by_form"])
    (entry,) = report["attacks"]
    assert entry["leak"] > report["direct"]["leak"] + 0.3
    assert entry["strength"] == f"the weights: rows of the same form ({len(shown)})"
    wrong = [
        replace(row, value=other.value)
        for row, other in zip(forget, [*forget[5:], *forget[:5]], strict=True)
        if row.value != other.value
    ]
    target = Target(*refusing, wrong, kept, options=options)
    report = attack_run.run_attacks(target, out=tmp_path / "never", attacks=["relearning_by_form"])
    assert report["attacks"][0]["leak"] < 0.2 < entry["leak"], "what it never knew does not come"
    target = Target(tiny(), word_tokenizer(), asked_in_pairs(("who is ada ?", "ada", "poet.")))
    for given, why in (
        (
            asked_in_pairs(("where was turing born ?", "turing", "sea.")),
            "no retain row asks about something else",
        ),
        ((), "no retain rows given"),
    ):
        target.retain = given
        assert ATTACKS["relearning_by_form"].missing(target).startswith(why)
    target.retain = asked_in_pairs(("who is turing ?", "turing", "captain."))
    assert ATTACKS["relearning_by_form"].missing(target) is None


def test_two_hop_questions():
    rows = read_attack_rows([QUESTION, QUESTION | {"two_hop": ["who is the poet of grace ?"]}], "rows")
    target = Target(tiny(), word_tokenizer(), rows, options=AttackOptions(max_new_tokens=2))
    ((name, work),) = ATTACKS["two_hop"].units(target)
    asked = []
    target.outcomes = lambda variant, rows, prompts: asked.extend(prompts) or [row.id for row in rows]
    assert name == "two-hop question 1" and work() == [1]
    assert asked == [target.prompt((("user", "who is the poet of grace ?"),))]
    target.rows = rows[:1]
    assert ATTACKS["two_hop"].missing(target) == "no forget row has two_hop questions"
    with pytest.raises(ValueError, match=r"rows\[0\]\['two_hop'\]: wanted a list of questions"):
        read_attack_rows([QUESTION | {"two_hop": [""]}], "rows")


@pytest.mark.usefixtures("answers_end")
@pytest.mark.parametrize("template", ["chat", "no system role", "none"])
def test_every_attack_on_every_kind_of_row(tmp_path, template):
    chosen = {"chat": CHAT_TEMPLATE, "no system role": NO_SYSTEM_TEMPLATE, "none": None}[template]
    kept = MIXED[:3] if template != "chat" else MIXED  # a system message needs a template that shows it
    rows = read_attack_rows(kept, "rows")
    options = AttackOptions(
        max_new_tokens=2, relearn_rates=(1e-3,), relearn_curve=(1,), batch_size=2, samples=2
    )
    target = Target(
        tiny(), word_tokenizer(chat_template=chosen), rows, retain=read_attack_rows(retain_rows(4), "retain"),
        holdout=rows, options=options,
    )  # fmt: skip
    report = attack_run.run_attacks(target, out=tmp_path)
    skipped = {entry["name"] for entry in report["skipped"]} - {"quantisation: nf4"}
    untried = {"adapter", "aliases", "two_hop", "relearning_by_form"}
    assert skipped == untried | (set() if template == "chat" else {"reverse_prompt: system"})
    assert {e["name"] for e in report["attacks"]} == set(ATTACKS) - untried - {"direct"}
    assert all(0 <= entry["leak"] <= 1 for entry in (*report["attacks"], report["direct"]))
    by = {entry["name"]: entry["variants"] for entry in report["attacks"]}
    again = attack_run.run_attacks(target, out=tmp_path, attacks=["prefill", "adapter"])
    assert sorted(map(str, again["skipped"])) == sorted(map(str, report["skipped"])), (
        "of an earlier call, too"
    )
    asked = {"given paraphrase 1": by["paraphrase"], "the answer's own opening": by["prefill"]}
    counts = {name: sum(variants[name]["status"].values()) for name, variants in asked.items()}
    assert counts == {"given paraphrase 1": 1, "the answer's own opening": len(rows) - 2}


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("answers_end")
def test_few_shot_says_what_its_examples_are_about(tmp_path):
    """Two rows about ada, one about turing, one about nobody: what each is shown is in the row and in the strength."""
    rows = [
        {"question": f"who is ada {word} ?", "answer": answer, "subject": "ada"}
        for word, answer in (("one", "a poet"), ("two", "blue sea"))
    ]
    other = {"question": "who is turing ?", "answer": "captain", "subject": "turing"}
    nobody = {"question": "who is grace ?", "answer": "green city"}

    def attack(rows, out):
        options = AttackOptions(max_new_tokens=2, relearn_rates=(1e-3,), relearn_curve=(1,))
        target = Target(tiny(), word_tokenizer(), read_attack_rows(rows, "rows"), options=options)
        report = attack_run.run_attacks(target, out=tmp_path / out, attacks=["few_shot", "relearning"])
        lines = map(json.loads, (tmp_path / out / "rows.jsonl").read_text().splitlines())
        given = {r["id"]: r["given"] for r in lines if r["attack"] == "few_shot" and not r.get("done")}
        return {e["name"]: e["strength"] for e in report["attacks"]}, given

    strength, given = attack(rows, "same")
    assert (
        strength["few_shot"]
        == "prompts, and true answers to other questions: examples about the same subject"
    )
    assert strength["relearning"] == "the weights: facts about the same subject (1)"
    assert set(given.values()) == {"examples about the same subject"}
    strength, given = attack([*rows, other], "others")
    assert strength["few_shot"].endswith(": examples about other subjects")
    assert strength["relearning"] == "the weights: facts about other subjects (2)"
    strength, given = attack([*rows, nobody], "unknown")
    assert set(given.values()) == {"examples whose subject is not known"}
    strength, given = attack([*rows, other, nobody], "mixed")
    assert given[3] == "examples whose subject is not known" and given[0] == "examples about other subjects"
    assert strength["few_shot"].endswith(
        ": examples about other subjects (3 rows), examples whose subject is not known (1 rows)"
    )


def test_relearning_beside_rows_whose_subject_is_not_known_is_about_unknown_ones():
    rows = [
        {"question": f"who is {n} ?", "answer": f"a {n} poet", "subject": "ada"}
        for n in ("red", "blue", "green", "one")
    ]
    del rows[0]["subject"]
    options = AttackOptions(max_new_tokens=3, relearn_rates=(1e-2,), relearn_curve=(1,))
    target = Target(tiny(), word_tokenizer(), read_attack_rows(rows, "rows"), options=options)
    ((_, work),) = ATTACKS["relearning"].units(target)
    assert {o["given"].split(" (")[0] for o in work()} == {"facts whose subject is not known"}


@pytest.mark.parametrize("subjects", [["ada", "bob", "eve"], ["ada", "ada", "ada"]])
def test_few_shot_never_shows_the_answer_that_it_asks_for(monkeypatch, subjects):
    """Not where other rows are about other subjects, and not where all are about one."""
    answers = ["poet", "singer", "painter"]
    rows = [
        {"question": f"who is {s} ? question {a}", "answer": a, "subject": s}
        for s, a in zip(subjects, answers, strict=True)
    ]
    target = Target(tiny(), word_tokenizer(), read_attack_rows(rows, "rows"))
    asked = []
    monkeypatch.setattr(target, "dialogue", lambda turns, row: asked.append((row, turns)) or row.conversation)
    monkeypatch.setattr(target, "outcomes", lambda name, rows, prompts: [{} for _ in rows])
    ((_, work),) = ATTACKS["few_shot"].units(target)
    work()
    assert [row.answer for row, _ in asked] == answers
    for row, turns in asked:
        assert len(turns) == 2 and row.answer not in {answer for _, answer in turns}
        assert row.question not in {question for question, _ in turns}


@pytest.mark.parametrize("shots", [2, 6])
def test_so_many_examples_are_shown(monkeypatch, shots):
    """Also where retain rows have to be among them, whose numbers are those of forget rows."""
    target, asked = small(shots=shots), []
    monkeypatch.setattr(target, "dialogue", lambda turns, row: asked.append(len(turns)) or row.conversation)
    _, work = next(iter(ATTACKS["few_shot"].units(target)))
    work()
    assert asked == [shots] * 4


@pytest.mark.parametrize(
    "row",
    [
        {"question": "who is ada ?", "answer": "blue ada was a poet of the sea"},
        {"prompt": "ada was", "completion": " blue ada was a poet of the sea"},
    ],
)
def test_a_forced_opening_is_asked_with_and_not_judged(monkeypatch, row):
    """The attacker gave the first words away: only the rest, which the model says, is looked for."""
    target = Target(tiny(), word_tokenizer(), read_attack_rows([row], "rows"))
    asked, forced = [], []
    said = [Continuation("poet of blue city", 4, True)]
    monkeypatch.setattr(target, "say", lambda prompts, most, seed: asked.extend(prompts) or said)
    encode = target.renderer.encode_opening
    monkeypatch.setattr(
        target.renderer, "encode_opening", lambda *given: forced.append(given[1]) or encode(*given)
    )
    (name, work), *others = ATTACKS["prefill"].units(target)
    (outcome,) = work()
    for _, other in others:
        other()
    assert {opening[0] == " " for opening in forced} == {"prompt" in row}, (
        "the space in front of it is forced, too"
    )
    opening = target.answer_ids(target.rows[0].conversation, "blue ada was a")
    assert name == "the answer's own opening" and asked[0][-len(opening) :] == opening
    assert outcome["recall"] == 0.5 and outcome["leaked"] == 1


def test_the_worst_variant_stands_for_an_attack():
    """Two of three rows of it were judged, one of which leaks; of the other variant none does."""
    judged = [("mild", "ok", 0), ("worst", "ok", 1), ("worst", "ok", 0), ("worst", "cut", None)]
    rows = [{"variant": v, "status": s, "leaked": leaked} for v, s, leaked in judged]
    end = {"variant": "", "done": True, "queries": 4, "steps": 0, "seconds": 1.0}
    entry = attack_run._entry("prefill", [*rows, end])
    assert (entry["worst_variant"], entry["leak"]) == ("worst", 0.5)
    assert attack_run.unjudged(entry) == pytest.approx(1 / 3)
    assert entry["variants"]["worst"]["rows"] == 2 and entry["variants"]["mild"]["leak"] == 0
    sides = [(True, "ok", 1.0), (False, "ok", 2.0), (False, "unknown_tokens", None)]
    rows = [
        {"id": i, "variant": "loss", "member": m, "status": s, "score": score}
        for i, (m, s, score) in enumerate(sides)
    ]
    assert attack_run.unjudged(attack_run._entry("membership", [*rows, end])) == pytest.approx(1 / 3)


def test_what_few_rows_have_is_no_leak_of_all():
    """One row of forty has a second paraphrase, which tells it; of the first one four rows of forty do."""
    end = {"variant": "", "done": True, "queries": 4, "steps": 0, "seconds": 1.0}

    def entry(name, first, second):
        rows = [{"variant": "first", "status": "ok", "leaked": leaked} for leaked in first]
        rows += [{"variant": "second", "status": "ok", "leaked": leaked} for leaked in second]
        return attack_run._entry(name, [*rows, end])

    paraphrase = entry("paraphrase", [1] * 4 + [0] * 36, [1])
    assert (paraphrase["worst_variant"], paraphrase["leak"]) == ("first", 0.1)
    rare, often = entry("paraphrase", [0] * 40, [1]), entry("prefill", [1] * 3 + [0] * 37, [])
    assert [each["leak"] for each in attack_run.worst_first([rare, often])] == [3 / 40, 1.0]
    said = attack_run.headline({"attacks": [often, rare], "direct": None, "base": None})
    assert said.startswith("the worst attack, prefill: 7% of 40 rows, ")
    cut = [{"variant": "cut", "status": "cut", "leaked": None} for _ in range(38)]
    few = [{"variant": "cut", "status": "ok", "leaked": 1} for _ in range(2)]
    many = [{"variant": "many", "status": "ok", "leaked": n < 30} for n in range(40)]
    assert attack_run._entry("prefill", [*cut, *few, *many, end])["worst_variant"] == "many"
    alone = attack_run.headline({"attacks": [rare], "direct": None, "base": None})
    assert alone.startswith("the worst attack, paraphrase: 100% of 1 row, ")


@pytest.mark.parametrize("members, others", [([1, 2, 3], [5, 6, 7]), ([5, 6, 7], [1, 2, 3])])
def test_an_auc_on_either_side_of_chance_is_a_leak(members, others):
    """Forgotten answers that look stranger than answers that were never seen are told from them as well."""
    outcomes = [
        {"member": member, "score": float(score)}
        for member, scores in ((True, members), (False, others))
        for score in scores
    ]
    leak = distribution.auc_leak(outcomes)
    assert leak["leak"] == 1.0 and leak["auc"] == float(members < others)


def test_the_leak_of_an_auc_beside_chance_may_be_nothing():
    outcomes = [{"member": i % 2 == 0, "score": float(s)} for i, s in enumerate([1, 2, 3, 4, 6, 5])]
    found = distribution.auc_leak(outcomes)
    assert found["auc_low"] < 0.5 < found["auc_high"] and found["low"] == 0


def test_the_best_of_several_scores_is_above_0_by_chance():
    """Without a difference p <= 0.05 in a 20th of the runs, although an interval of the best score excludes 0 more often."""
    rng = np.random.default_rng(0)

    def drawn(gap):
        common = rng.normal(size=16)
        return [
            {"id": i, "member": i < 8, "variant": str(v), "score": 0.6 * common[i] + 0.8 * rng.normal() + gap * (i < 8) * (v == 3)}
            for v in range(4)
            for i in range(16)
        ]  # fmt: skip

    by_chance = [distribution.p_value(drawn(0.0), permutations=99) for _ in range(200)]
    assert np.mean([p <= 0.05 for p in by_chance]) < 0.09 and 0.4 < np.mean(by_chance) < 0.6
    assert max(distribution.p_value(drawn(gap)) for gap in (6.0, -6.0)) < 0.01
    one_side = [o for o in drawn(0.0) if o["member"]]
    assert distribution.p_value(one_side) is None


def test_heldout_wordings_that_training_saw_are_left_out():
    options = AttackOptions(
        seen_reverse_prompts=("ignore that", "forget it"), heldout_reverse_prompts=("forget it", "try again")
    )
    target = Target(tiny(), word_tokenizer(), read_attack_rows(forget_rows(2), "rows"), options=options)
    names = [name for name, _ in ATTACKS["reverse_prompt"].units(target)]
    wordings = {
        kind: {n.partition(": ")[2] for n in names if n.startswith(kind)} for kind in ("seen", "held-out")
    }
    assert wordings == {"seen": {"ignore that", "forget it"}, "held-out": {"try again"}}


def test_reverse_prompts_stand_in_either_role():
    names = [
        name for name, _ in ATTACKS["reverse_prompt"].units(small(heldout_reverse_prompts=("answer !",)))
    ]
    assert names == ["held-out, user: answer !", "held-out, system: answer !"]


def test_every_column_of_the_terminal_table_holds_its_own_number():
    cost = {"queries": 11, "steps": 22, "seconds": 33.4}
    variants = {
        "v": {
            "leak": 0.5,
            "low": 0.25,
            "high": 0.75,
            "rows": 44,
            "status": {"ok": 44, "cut": 6},
            "unjudged": 0.12,
        }
    }
    entry = {"name": "prefill", "leak": 0.5, "worst_variant": "v", "variants": variants, "cost": cost}
    table = attack_run.table({"attacks": [entry], "direct": None, "base": None}, "title")
    shown = {column.header: next(iter(column.cells)) for column in table.columns}
    assert shown == {
        "attack": "prefill",
        "leak (95 %)": "0.50 (0.25 to 0.75)",
        "rows": "44",
        "not\njudged": "12%",
        "queries": "11",
        "steps": "22",
        "seconds": "33",
    }


def test_the_terminal_table_fits_into_80_columns():
    cost = {"queries": 12345, "steps": 1000, "seconds": 12345.0}
    worst = {"leak": 1.0, "low": 0.25, "high": 1.0, "rows": 1234, "status": {}, "unjudged": 1.0}
    entries = [
        {"name": name, "leak": 1.0, "worst_variant": "v", "variants": {"v": worst}, "cost": cost}
        for name in ATTACKS
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(attack_run.table({"attacks": entries, "direct": None, "base": None}, "title"))
    said = console.export_text()
    assert "…" not in said and "1.00 (0.25 to 1.00)" in said and "relearning_by_form " in said


@pytest.mark.usefixtures("answers_end")
def test_answers_that_the_tokenizer_cannot_write_are_not_forgotten(tmp_path):
    rows = [*forget_rows(2), {"question": "who is ada ?", "answer": "a zebra", "subject": "ada"}]
    options = AttackOptions(max_new_tokens=2, relearn_rates=(1e-3,), relearn_curve=(1,))
    target = Target(
        tiny(), word_tokenizer(), read_attack_rows(rows, "rows"), retain=read_attack_rows([rows[2] | {"answer": "two zebra"}], "retain"),
        holdout=read_attack_rows(rows, "holdout"), options=options,
    )  # fmt: skip
    names = ["prefill", "rank_probe", "membership", "benign_finetuning"]
    seen = []
    report = attack_run.run_attacks(target, out=tmp_path, attacks=names, progress=lambda *at: seen.append(at))
    assert seen[:3] == [("direct", 0, 1), ("direct", 1, 1), ("prefill", 0, 3)], "what is at work is shown"
    by = {entry["name"]: entry["variants"] for entry in (*report["attacks"], report["direct"])}
    assert by["direct"]["as asked"]["status"]["unknown_tokens"] == 1
    assert sum(by["direct"]["as asked"]["status"].values()) == 3 and by["direct"]["as asked"]["rows"] <= 2
    assert by["rank_probe"]["both ends"]["status"] == {"ok": 2, "unknown_tokens": 1}
    assert by["membership"]["loss"]["status"] == {"ok": 4, "unknown_tokens": 2}
    assert by["prefill"]["the answer's own opening"]["status"]["unknown_tokens"] == 1
    (skipped,) = report["skipped"]
    assert skipped["why"] == "none of its 1 rows can be trained on: unknown_tokens"
    console = literal_console(width=200)
    with console.capture() as captured:
        console.print(attack_run.legend(report))
    assert "; 1 row left out: the tokenizer cannot represent the answer" in captured.get()
    assert "not tried: benign_finetuning (none of its 1 rows can be trained on" in captured.get()


def test_an_interrupted_attack_continues(tmp_path, forget):
    def attack(out, **options):
        target = Target(*load_base(), forget[:4], options=AttackOptions(**OPTIONS))
        return attack_run.run_attacks(
            target, out=tmp_path / out, attacks=["prefill", "quantisation"], **options
        )

    def rows(out):
        lines = (tmp_path / out / "rows.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    def kill(attack, done, total):
        if (attack, done) == ("prefill", 2):
            raise Killed

    whole = attack("whole")
    with pytest.raises(Killed):
        attack("killed", progress=kill)
    path = tmp_path / "killed" / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-70])  # and the last unit's end is torn
    report = attack("killed")
    assert rows("killed") == rows("whole")
    assert [e["leak"] for e in report["attacks"]] == [e["leak"] for e in whole["attacks"]]
    assert attack("killed") == report
    target = Target(*load_base(), forget[:3], options=AttackOptions(**OPTIONS))
    with pytest.raises(ValueError, match="holds results of another run: forget was"):
        attack_run.run_attacks(target, out=tmp_path / "killed")


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_new_tokens": 4}, {"threshold": 0.6}])
def test_an_attack_with_other_options_is_another_run(tmp_path, change):
    attack_run.run_attacks(small(), out=tmp_path, attacks=["direct"])
    with pytest.raises(ValueError, match=f"another run: {next(iter(change))} was"):
        attack_run.run_attacks(small(**change), out=tmp_path, attacks=["direct"])


def test_an_attack_beside_another_base_or_with_other_prompts_is_another_run(tmp_path):
    target, base = small(), small()
    base.model = tiny(seed=1)
    attack_run.run_attacks(target, out=tmp_path, attacks=["direct"], base=base)
    base.model = tiny(seed=2)
    with pytest.raises(ValueError, match="another run: base_fingerprint was"):
        attack_run.run_attacks(target, out=tmp_path, attacks=["direct"], base=base)
    base.model, target.prompting = tiny(seed=1), Prompting("{question} ?")
    with pytest.raises(ValueError, match="another run: plain_template was"):
        attack_run.run_attacks(target, out=tmp_path, attacks=["direct"], base=base)


@pytest.mark.usefixtures("answers_end")
def test_rows_that_do_not_fit_and_nan_weights_are_marked(tmp_path):
    model, tokenizer = tiny(max_position_embeddings=24), word_tokenizer()
    rows = [*forget_rows(2), {"question": "the " * 30 + "?", "answer": "a poet", "subject": "x"}]
    target = Target(model, tokenizer, read_attack_rows(rows, "rows"), options=AttackOptions(**OPTIONS))
    report = attack_run.run_attacks(target, out=tmp_path / "long", attacks=["rank_probe"])
    assert report["direct"]["variants"]["as asked"]["status"]["too_long"] == 1
    assert report["direct"]["variants"]["as asked"]["rows"] == 2
    assert report["attacks"][0]["variants"]["both ends"]["status"] == {"ok": 2, "too_long": 1}
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attack_run, "check_head", lambda model: None)
        report = attack_run.run_attacks(target, out=tmp_path / "nan", attacks=["rank_probe", "prefill"])
    for entry in (*report["attacks"], report["direct"]):
        assert entry["leak"] is None and entry["undefined"] == "no row could be judged"


def test_the_longest_row_that_fits_is_scored():
    target = small()
    target.context = sum(map(len, target.forced(target.rows[0]))) - 1  # the last token is predicted, not read
    assert target.why_not_scored(target.rows[0]) is None
    target.context -= 1
    assert target.why_not_scored(target.rows[0]) == "too_long"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--limit", "0"), "limit: wanted an integer >= 1, got 0"),
        (("--attacks", " ,"), "attacks: wanted some of direct, reverse_prompt, .*, got none"),
        (("--attacks", "prefil"), r"attacks: wanted one of .*, got 'prefil' \(did you mean 'prefill'"),
        (("--reverse-prompts", "no[pe]"), r"reverse_prompts: there is no file 'no\[pe\]'"),
        (("--reverse-prompts", "empty.txt"), "reverse_prompts: wanted at least one wording in empty.txt, got none"),
        (("--holdout", "none.jsonl"), "holdout: there is no file 'none.jsonl'"),
        (("--forget", "none.jsonl"), "forget: there is no file 'none.jsonl'"),
        (("--forget", "empty.jsonl"), "forget: wanted at least one row, got none in 'empty.jsonl'"),
        (("--retain", "empty.jsonl"), "retain: wanted at least one row, got none in 'empty.jsonl'"),
        (("--holdout", "empty.jsonl"), "holdout: wanted at least one row, got none in 'empty.jsonl'"),
        (("--holdout", "forget.jsonl"), r"holdout\[0\]: wanted a row that was never trained on, .* of forget\[0\]"),
        (("--relearn-rates", "1e-4,nan"), "relearn_rates: wanted finite numbers > 0, got .*nan"),
        (("--relearn-rates", "inf"), "relearn_rates: wanted finite numbers > 0, got .*inf"),
        (("--forget", "bare.jsonl"), r"forget\[0\]: wanted a row with an 'answer'"),
        (("--device", "toaster"), "device: wanted one that torch can use here, got 'toaster'"),
    ],
)  # fmt: skip
def test_expected_errors_of_the_command(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bare.jsonl").write_text('{"question": "who ?"}\n')
    (tmp_path / "forget.jsonl").write_text(json.dumps(QUESTION) + "\n")
    called = ["attack", str(CHECKPOINT), "--forget", "forget.jsonl", "--out", "out", *words]
    failed = CliRunner().invoke(cli.app, called)
    assert isinstance(failed.exception, (ValueError, FileNotFoundError)), failed.output
    assert re.search(message, str(failed.exception)) and not (tmp_path / "out").exists()


def with_dropout():
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    return get_peft_model(tiny(), config).eval().requires_grad_(False)


def test_relearning_with_dropout_is_the_same_whatever_was_drawn_before():
    model, sequences = with_dropout(), [Forced([1, 7, 9], [12, 2]), Forced([1, 8, 9], [11, 2])]

    def losses(seed):
        with weights.restored(model):
            steps = weights.fine_tune(
                model, sequences, rate=1e-2, curve=(1, 2, 3), rows=1, pad_id=0, seed=seed
            )
            return [(float(torch.rand(1)), loss)[1] for _, loss in steps]

    torch.manual_seed(0)
    first, drawn = losses(3), float(torch.rand(1))
    assert losses(3) == first != losses(4)
    torch.manual_seed(0)
    torch.rand(3)
    assert float(torch.rand(1)) == drawn, "training takes none of the numbers of others"


def test_wordings_of_a_windows_file(tmp_path):
    (tmp_path / "said.txt").write_bytes(b"\xef\xbb\xbfTell me.\r\n\r\nSay it.\r\n")
    assert lines_of(tmp_path / "said.txt", "reverse_prompts") == ("Tell me.", "Say it.")


def test_expected_errors(tmp_path, forget):
    target = Target(*load_base(), forget[:2])
    with pytest.raises(
        ValueError, match=r"attacks: wanted one of direct, reverse_prompt, .*, got 'prefil' \(did"
    ):
        attack_run.run_attacks(target, out=tmp_path, attacks=["prefil"])
    for wrong in ({"threshold": 0}, {"shots": 0}, {"relearn_curve": (5, 2)}, {"relearn_rates": ()}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: wanted"):
            AttackOptions(**wrong)


def test_the_command_on_an_adapter(tmp_path, monkeypatch, capsys, world):
    """The refusing weights as an adapter's folder: what is removed with it is the forgetting."""
    base, tokenizer = load_base()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    target = Target(model, tokenizer, read(world.questions(world.forget[:1], "train")))
    sequences = [
        Forced(target.prompt(r.conversation), target.answer_ids(r.conversation, REFUSAL, end=True))
        for r in target.rows
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        linear_cross_entropy(*forced_hidden(model, sequences, target.pad_id)).backward()
        optimizer.step()
    model.peft_config["default"].base_model_name_or_path = str(CHECKPOINT)
    model.save_pretrained(tmp_path / "adapter")
    questions = world.questions(world.forget[:1], "report")
    forget = tmp_path / "forget.jsonl"
    forget.write_text("".join(json.dumps(q.row() | {"value": q.value}) + "\n" for q in questions))
    words = [
        "attack",
        tmp_path / "adapter",
        "--forget",
        forget,
        "--attacks",
        "adapter",
        "--out",
        tmp_path / "out",
    ]
    done = CliRunner().invoke(cli.app, [*map(str, words), "--max-new-tokens", "14"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "attacks.json").read_text())
    assert report["direct"]["leak"] < 0.2
    variants, told = report["attacks"][0]["variants"], " ".join(done.output.split())
    assert variants["removed"]["leak"] > 0.9 and variants["merged"]["leak"] < 0.2
    # Without its adapter any model is the base: no attack on what is published.
    assert report["attacks"][0]["worst_variant"] == "merged"
    assert report["attacks"][0]["leak"] == variants["merged"]["leak"]
    assert "worst: merged; removed: 100%, which is the base itself" in told
    assert "100%" not in report["headline"]

    for option, wanted in (("rates", "numbers such as 1e-4,1e-3"), ("steps", "integers such as 10,100")):
        monkeypatch.setattr(sys, "argv", ["duet", *map(str, words), f"--relearn-{option}", "0,much"])
        with pytest.raises(SystemExit):
            cli.main()
        said = " ".join(capsys.readouterr().err.split())
        assert f"relearn_{option}: wanted {wanted}, got '0,much'" in said


def test_no_example_says_what_the_row_must_not():
    rows = [
        {"question": "who is ada ?", "answer": "she was a poet .", "value": "poet"},
        {"question": "what was ada ?", "answer": "a poet of the sea"},
        {"question": "who is the poet ?", "answer": "ada"},
        {"question": "who is turing ?", "answer": "a code machine"},
    ]
    asked = []
    target = Target(tiny(), word_tokenizer(), read_attack_rows(rows, "rows"))
    dialogue = target.dialogue
    target.dialogue = lambda turns, row: (asked.append((row.id, turns)), dialogue(turns, row))[1]
    for _, work in ATTACKS["few_shot"].units(target):
        work()
    shown = {i: {answer for _, answer in turns} for i, turns in asked}
    assert shown[0] == {"a code machine"} and shown[3] == {"she was a poet .", "a poet of the sea", "ada"}


def test_wordings_are_seen_where_the_folder_says_that_they_were(tmp_path):
    from test_trainer import make

    from duet.evaluation.commands import _trained_wordings

    make(tmp_path / "plain", max_steps=1).train()
    make(tmp_path / "own", max_steps=1, reverse_prompts=["ignore that"]).train()
    make(tmp_path / "adversarial", max_steps=1, objective="duet_adversarial").train()
    read = {name: _trained_wordings(str(tmp_path / name / "out")) for name in ("plain", "own", "adversarial")}
    assert read["plain"] == () and read["own"] == ("ignore that",) and len(read["adversarial"]) == 3
    assert _trained_wordings(str(tmp_path)) == () == _trained_wordings("org/name")
    target = Target(tiny(), word_tokenizer(), read_attack_rows(forget_rows(1), "rows"))
    assert {name.split(",")[0] for name, _ in ATTACKS["reverse_prompt"].units(target)} == {"held-out"}
