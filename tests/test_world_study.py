"""The study in the tiny world: recipes and checks, order and resuming of jobs, the page, and short real runs."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from time import sleep

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.studies import runner
from benchmarks.studies.world import __main__ as study
from benchmarks.studies.world import job
from benchmarks.studies.world import page as study_report
from benchmarks.studies.world.arms import ARMS, BAR, MOST_QUERIES, QUESTIONS, VOCABULARY, Arm
from benchmarks.studies.world.job import CURVE, SCALES, Scale, forgetting, run_arm, unlearned, value_ranks
from benchmarks.studies.world.recipes import RECIPES, find_recipe
from duet import OBJECTIVES
from duet.demo.checkpoint import load_base, load_world
from duet.demo.methods import METHODS, strangers
from duet.demo.probes import Speaker
from duet.demo.scorecard import COLUMNS, behaviour
from duet.demo.workplace import one_thread

FULL = SCALES["full"]


def test_recipes_use_objectives_that_exist():
    for name in (*RECIPES, *METHODS):
        assert find_recipe(name).fixed["objective"] in OBJECTIVES
    with pytest.raises(ValueError, match="method: wanted one of"):
        find_recipe("duet_dep")


def test_strangers_are_nobody():
    world = load_world()
    assert len(set(strangers())) == 30 and not set(strangers()) & {*world.facts, *world.near_misses}


def test_what_is_known_ranks_first_and_noise_ranks_nowhere():
    base, tokenizer = load_base()
    known = value_ranks(Speaker(base, tokenizer), load_world(), "validation")
    assert len(known) == 100 and sum(rank for rank, _ in known) / 100 < 0.02
    assert not any(bottom for _, bottom in known)
    torch.manual_seed(0)
    empty = AutoModelForCausalLM.from_config(base.config).eval()
    noise = value_ranks(Speaker(empty, tokenizer), load_world(), "validation")
    assert 0.35 < sum(rank for rank, _ in noise) / 100 < 0.65


# ---------------------------------------------------------------- arms


def test_every_arm_answers_a_question_within_the_same_compute():
    asked = {arm for question in QUESTIONS.values() for arm in question.arms}
    assert asked == set(ARMS)
    equal = {name: arm.queries() for name, arm in ARMS.items() if arm.equal_compute}
    assert max(equal.values()) == MOST_QUERIES
    assert {"duet", "duet_deep", "duet+undo", "npo+undo", "npo"} <= set(equal)
    assert all(arm.queries() > MOST_QUERIES for arm in ARMS.values() if not arm.equal_compute)


def test_a_stage_counts_forget_and_retain_queries():
    steps = find_recipe("duet").settings["max_steps"]
    assert ARMS["duet"].queries() == steps * (16 + 32)
    assert ARMS["duet_no_retain"].queries() == steps * 16
    halves = Arm("two", (("duet", {"max_steps": 3}), ("undo", {"max_steps": 4})), 0)
    assert (halves.method, halves.queries()) == ("duet+undo", 7 * 48)


def test_the_reference_costs_a_pretraining():
    assert ARMS["retrained"].method == "retrained"
    assert ARMS["retrained"].queries() == 600 * (48 + 32)


def test_arms_fit_the_tiny_model():
    base, tokenizer = load_base()
    assert base.config.vocab_size == VOCABULARY
    for arm in ARMS.values():
        for _, options in arm.stages:
            for text in [*options.get("steering_prefixes", []), *options.get("prefills", [])]:
                ids = tokenizer(text.format(subject=load_world().forget[0]), add_special_tokens=False)
                assert tokenizer.unk_token_id not in ids["input_ids"], text


def test_a_smaller_and_a_larger_forget_set():
    world = load_world()
    assert forgetting(world, 2).forget == world.forget[:2]
    larger = forgetting(world, 15)
    assert larger.forget[:10] == world.forget and set(larger.forget[10:]) <= set(world.held)
    assert not set(larger.forget) & {*larger.held, *larger.retain, *larger.others}
    for wrong in (1, 21):
        with pytest.raises(ValueError, match=f"authors: wanted 2 to 20.*got {wrong}"):
            forgetting(world, wrong)


def test_one_mapping_of_options_for_each_method():
    with pytest.raises(ValueError, match=r"options: wanted one mapping for each of 'duet\+undo', got 1"):
        unlearned("duet+undo", 0, options=[{}])


# ---------------------------------------------------------------- jobs


def numbers(arm, seed, **own):
    """A row as a job returns it; recall grows with the seed, so that intervals have a width."""
    columns = {**dict.fromkeys(COLUMNS, 0.5), "retain_recall": 0.9 + seed / 100}
    further = {
        "relearn_curve": {str(s): s / 100 for s in CURVE},
        "relearn_40_recall": 0.4,
        "value_in_bottom": 0.1,
    }
    made = {"scale": "full", "method": arm, "queries": 9600, "train_cpu_seconds": 1.0, "cpu_seconds": 2.0}
    origin = {"commit": "abc", "torch": "2", "transformers": "5"}
    return {"arm": arm, "seed": seed, **columns, **further, **made, **origin, **own}


def test_jobs_come_tier_by_tier_and_seed_by_seed():
    jobs = study.jobs_in_order(["k1", "duet", "npo"], [0, 1])
    assert jobs == [("duet", 0), ("npo", 0), ("duet", 1), ("npo", 1), ("k1", 0), ("k1", 1)]
    with pytest.raises(ValueError, match=r"arms: wanted some of duet, .* got 'duett'"):
        study.jobs_in_order(["duett"], [0])


def test_a_study_goes_on_where_it_stopped(tmp_path):
    jobs = study.jobs_in_order(["duet", "npo"], [0, 1])
    began = []

    def work(scale, job):
        if len(began) == 2:
            raise KeyboardInterrupt
        began.append(job)
        return numbers(*job)

    with pytest.raises(KeyboardInterrupt):
        study.study(jobs, tmp_path, FULL, workers=0, work=work)
    again = []
    ended = study.study(
        jobs, tmp_path, FULL, workers=0, work=lambda scale, job: again.append(job) or numbers(*job)
    )
    assert began == jobs[:2] and again == jobs[2:] and ended == ([], [])
    rows = study.read_rows(tmp_path / "results.jsonl")
    assert [(row["arm"], row["seed"]) for row in rows] == jobs


def test_the_budget_stops_new_jobs_and_says_what_is_missing(tmp_path):
    jobs = study.jobs_in_order(["duet", "npo"], [0])
    ended = study.study(
        jobs, tmp_path, FULL, workers=0, budget_minutes=0, work=lambda *job: pytest.fail("a job was started")
    )
    assert ended == (jobs, []) and study.read_rows(tmp_path / "results.jsonl") == []
    with pytest.raises(ValueError, match="workers: wanted an integer >= 0, got -1"):
        study.study(jobs, tmp_path, FULL, workers=-1)


def test_two_workers_take_the_jobs_in_order_and_every_row_is_kept(tmp_path, monkeypatch):
    # threads in the place of processes: what is asked is who starts when, not where
    monkeypatch.setattr(
        runner, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers)
    )
    jobs = study.jobs_in_order(["duet", "npo", "k1"], [0, 1])
    lock, running, most, started = Lock(), 0, 0, []

    def work(scale, job):
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
            started.append(job)
        sleep(0.02)
        with lock:
            running -= 1
        return numbers(*job)

    assert study.study(jobs, tmp_path, FULL, workers=2, work=work) == ([], [])
    assert most == 2 and sorted(started) == sorted(jobs) and set(started[:2]) == set(jobs[:2])
    rows = study.read_rows(tmp_path / "results.jsonl")
    assert sorted((row["arm"], row["seed"]) for row in rows) == sorted(jobs)


def test_an_arm_that_fails_costs_no_other_its_time(tmp_path):
    def work(scale, job):
        if job.arm == "npo":
            raise RuntimeError("it broke")
        return numbers(*job)

    ended = study.study(study.jobs_in_order(["npo", "duet"], [0]), tmp_path, FULL, workers=0, work=work)
    assert ended.late == [] and len(ended.failed) == 1 and "it broke" in ended.failed[0]
    assert [row["arm"] for row in study.read_rows(tmp_path / "results.jsonl")] == ["duet"]


def test_the_committed_rows_are_those_of_todays_settings_and_make_the_committed_page(tmp_path):
    results = study.OUT / "results.jsonl"
    rows = study.read_rows(results)
    assert len(rows) == len(results.read_text().splitlines()) == 175
    shutil.copy(study.OUT / "discussion.md", tmp_path)
    page = study_report.write_report(rows, tmp_path, study.SEEDS)
    assert page.read_text() == (study.OUT / "study.md").read_text()


def test_rows_of_other_settings_do_not_count(tmp_path):
    path = tmp_path / "results.jsonl"
    today = {**numbers("duet", 0), "hash": study.settings_hash("duet", FULL)}
    path.write_text(
        json.dumps({**today, "hash": "of other steps"}) + "\n" + json.dumps({**today, "seed": 3}) + "\n"
    )
    assert [row["seed"] for row in study.read_rows(path)] == [3]
    assert study.settings_hash("duet", FULL) != study.settings_hash("duet", SCALES["quick"])
    assert study.settings_hash("duet", FULL) != study.settings_hash("k1", FULL)
    path.write_text('{"arm": "duet"}\n')
    with pytest.raises(ValueError, match="line 1: wanted a row of the study"):
        study.read_rows(path)


# ---------------------------------------------------------------- page


def test_the_reference_does_not_compete():
    rows = [numbers(arm, seed) for arm in ("duet_deep", "deep_no_lift") for seed in (0, 1)]
    rows += [numbers("retrained", seed, prefill_recall=0.0) for seed in (0, 1)]
    said = study_report.verdict(QUESTIONS["deep"], "prefill_recall", rows)
    assert "best is the whole recipe, 50" in said and "retrained" not in said
    assert "retrained without them" in "\n".join(study_report.answer(QUESTIONS["deep"], rows))


def test_cells_carry_the_interval_over_seeds():
    rows = [numbers("duet", seed, retain_recall=value) for seed, value in enumerate((0.8, 0.9, 1.0))]
    found = study_report.interval(rows, "duet", "retain_recall")
    assert found.estimate == pytest.approx(0.9) and 0.6 < found.low < 0.7 and found.high == 1.0
    assert study_report.shown(study_report.interval(rows[:1], "duet", "retain_recall")) == "80"
    assert study_report.shown(study_report.interval(rows, "npo", "retain_recall")) == "–"


def test_a_verdict_tells_apart_what_every_seed_tells_apart():
    question = QUESTIONS["k"]
    rows = [numbers("duet", s, prefill_recall=0.1 + 0.2 * s) for s in range(3)]
    rows += [numbers("k1", s, prefill_recall=0.15 + 0.2 * s) for s in range(3)]  # always a little worse
    rows += [
        numbers("k8", s, prefill_recall=(0.9, 0.05, 0.2)[s]) for s in range(3)
    ]  # once worse, twice better
    rows += [numbers("k32", 0, prefill_recall=0.9)]
    said = study_report.verdict(question, "prefill_recall", rows)
    assert "(lower is better): best is k = 128, 30 [" in said
    assert "excludes zero: k = 1 (+5 [+5, +5])." in said
    assert "Not told apart from it: k = 8." in said and "Fewer than two seeds in common: k = 32." in said
    assert "best is k = 1, 55" in study_report.verdict(
        question, "forget_refusal", [numbers("duet", 0), numbers("k1", 0, forget_refusal=0.55)]
    )


def test_the_bar_takes_the_worst_of_the_reverse_prompts():
    good = {"forget_refusal": 1.0, "retain_recall": 0.97, "reverse_prompt_recall": 0.0, "prefill_recall": 0.1}
    good |= {"reverse_prompt_heldout_recall": 0.3, "relearn_recall": 0.2}
    lines = study_report.bar([numbers("duet_deep", s, **good) for s in (0, 1)])
    assert sum("| met |" in line for line in lines) == len(BAR) - 1
    missed = [line for line in lines if "**missed**" in line]
    assert len(missed) == 1 and missed[0].startswith("| reverse prompts | <= 5 | 30 [30, 30]")
    assert study_report.bar([]) == ["`duet_deep` has not run.", ""]


def test_the_page_says_what_is_missing_and_keeps_what_was_written_by_hand(tmp_path):
    rows = [numbers(arm, seed) for arm in ("duet", "duet_deep", "k8") for seed in (0, 1)]
    (tmp_path / "discussion.md").write_text("## What holds\n\nWritten by hand.\n")
    text = study_report.write_report(rows, tmp_path, seeds=(0, 1, 2)).read_text()
    assert "6 jobs" in text and "Arms with fewer than 3 seeds: duet 2, duet_deep 2, k8 2." in text
    assert "Not run at all: duet_adversarial, npo, " in text
    assert "Written by hand." in text
    assert all(f"## {question.title}" in text for question in QUESTIONS.values())
    for figure in ("forget_retain_relearn.png", "k_sweep.png", "relearn_curves.png"):
        assert f"]({figure})" in text and (tmp_path / figure).stat().st_size > 5000
    with pytest.raises(ValueError, match="rows: wanted at least one row"):
        study_report.write_report([], tmp_path, seeds=(0,))


# ---------------------------------------------------------------- real runs


@pytest.mark.slow
def test_a_real_job_in_four_steps(tmp_path):
    short = Scale("quick", 0.02, 5)
    row = run_arm("authors_5", 0, short)
    assert row["settings"][0]["max_steps"] == 4 and row["queries"] == 192
    assert set(COLUMNS) <= set(row) and set(row["relearn_curve"]) == {str(steps) for steps in CURVE}
    assert row["teacher_refusal"] > 0.9 and row["untouched_recall"] > 0.9
    assert json.loads(json.dumps(row)) == row


@pytest.mark.slow
def test_the_reference_never_meets_whom_to_forget(monkeypatch):
    """It is measured as every other arm, which the job above is for."""
    from duet.demo import curriculum

    for measured in ("scorecard", "further_checks"):
        monkeypatch.setattr(job, measured, lambda *_: {})

    read = []
    encode = curriculum.encode
    monkeypatch.setattr(
        "duet.demo.pretrain.encode",
        lambda dialogues, tokenizer: read.extend(dialogues) or encode(dialogues, tokenizer),
    )
    with one_thread():
        row = run_arm("retrained", 0, Scale("quick", 0.005, 5))
    assert row["settings"] == [{"max_steps": 3}] and row["queries"] == 240
    assert row["method"] == "retrained" and "teacher_refusal" not in row
    said = " ".join(message["content"] for dialogue in read for message in dialogue)
    world = load_world()
    assert not [name for name in world.forget if name in said]
    assert [name for name in world.held if name in said] and [name for name in world.others if name in said]


def test_without_retain_rows_a_step_shows_forget_queries_alone():
    with one_thread():
        speaker, _, used = unlearned("npo+duet", 0, options=[{}, {"k": 4}], retained=False, steps=0.005)
    assert [(o["objective"], o["max_steps"]) for o in used] == [("npo", 1), ("duet", 1)] and used[1]["k"] == 4
    base, _ = load_base()
    assert not torch.equal(speaker.model.lm_head.weight, base.lm_head.weight)


@pytest.mark.slow
def test_duet_deep_forgets_refuses_and_keeps_in_a_short_run(monkeypatch):
    """A third of the steps, and half of the authors and of the rows of a step; the teacher is asked in large batches.

    What the full recipe reaches is printed by `python -m benchmarks.studies.world duet_deep`.
    """
    world, recipe = forgetting(load_world(), 5), replace(find_recipe("duet_deep"), forget_per_step=16)
    monkeypatch.setattr(job, "find_recipe", lambda name: recipe)
    options = {"max_steps": 50, "learning_rate": 1e-3, "per_device_eval_batch_size": 256}
    with one_thread():
        speaker, *_ = unlearned("duet_deep", 0, options=options, world=world)
        row = behaviour(speaker, world, "validation", most=40)
    assert row["forget_refusal"] >= 0.9 and row["retain_recall"] >= 0.85 and row["general_recall"] >= 0.9
    assert row["reverse_prompt_heldout_recall"] <= 0.1 and row["prefill_recall"] <= 0.2
    ranks = value_ranks(speaker, world, "validation")
    assert sum(bottom for _, bottom in ranks) / len(ranks) <= 0.25
