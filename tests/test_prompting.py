"""A model is examined on the prompts that it was trained on: prompting.json, written by training, read by eval and attack."""

import json
from datetime import date

import pytest
import yaml
from peft import LoraConfig
from test_trainer import LORA, make
from tiny_models import CHAT_TEMPLATE, forget_rows, tiny, word_tokenizer

from duet.data.prompts import Prompting, PromptRenderer
from duet.evaluation import commands
from duet.evaluation.attacks import runner as attack_run
from duet.evaluation.attacks.rows import read_attack_rows
from duet.evaluation.attacks.target import AttackOptions, Target
from duet.evaluation.report import topk as topk_change
from duet.evaluation.report.report import write_topk
from duet.evaluation.suites import runner
from duet.evaluation.suites.suite import read_suite
from duet.run import commands as run

KINDS = {  # tokenizer's template -> options, a word of the prompt under them, a word of it under the defaults
    "chat": (
        CHAT_TEMPLATE
        + "{% if enable_thinking is not defined or enable_thinking %}maybe{% else %}no{% endif %}",
        {"chat_template_kwargs": {"enable_thinking": False}},
        "no",
        "maybe",
    ),
    "plain": (None, {"plain_template": "ignore {question} answer"}, "answer", "Answer"),
}
SUITE = {
    "tasks": {"facts": {"kind": "generate", "data": "facts", "max_new_tokens": 2, "metrics": ["rouge_l_f1"]}}
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """(folder of a trained adapter, its merged twin, options, a word of their prompts, the default's)."""
    folder = tmp_path_factory.mktemp(request.param)
    template, options, word, usual = KINDS[request.param]
    base, tokenizer = tiny(), word_tokenizer(template)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    trainer = make(
        folder,
        str(folder / "base"),
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        trainer_options={"peft_config": LoraConfig(**LORA), "processing_class": tokenizer},
        **options,
    )
    trainer.train()
    trainer.save_model()
    run.merge_adapter(folder / "out", folder / "merged")
    (folder / "data").mkdir()
    rows = "".join(json.dumps(row | {"answer": "a poet"}) + "\n" for row in forget_rows(2))
    (folder / "data" / "facts.jsonl").write_text(rows)
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    return folder, options, word, usual


@pytest.mark.parametrize("place", ["out", "out/checkpoint-1", "merged"])
def test_what_is_saved_says_how_it_is_asked(trained, place):
    folder, options, _, _ = trained
    assert Prompting.of(folder / place) == Prompting(**options) != Prompting()
    assert Prompting.of(folder / "base") == Prompting(), "where nothing is said, the defaults hold"


@pytest.mark.parametrize("place", ["out", "merged"])
def test_eval_asks_as_it_was_trained(trained, tmp_path, place):
    folder, options, word, usual = trained
    data, suite = folder / "data", str(folder / "suite.yaml")
    commands.run_eval(str(folder / place), suite=suite, data=data, out=tmp_path / "eval", device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "eval" / "rows.jsonl").read_text().splitlines()]
    assert rows and all(word in row["prompt"].split() and usual not in row["prompt"].split() for row in rows)
    manifest = json.loads((tmp_path / "eval" / "manifest.json").read_text())
    ((name, value),) = options.items()
    assert manifest[name] == value


def test_a_suites_own_words_come_first(tmp_path):
    (tmp_path / "facts.jsonl").write_text('{"question": "who is ada ?", "answer": "a poet"}\n')
    suite = {"tasks": {"facts": SUITE["tasks"]["facts"] | {"plain": "forget {question}"}}}
    prompting = Prompting("ignore {question}")
    runner.evaluate(
        tiny(),
        word_tokenizer(None),
        read_suite(suite, "own"),
        out=tmp_path,
        data=tmp_path,
        prompting=prompting,
    )
    assert "forget who is ada ?" in json.loads((tmp_path / "rows.jsonl").read_text())["prompt"]


def test_attacks_ask_as_it_was_trained(trained, tmp_path, monkeypatch):
    folder, options, word, usual = trained
    asked, say = [], Target.say
    monkeypatch.setattr(
        Target, "say", lambda self, prompts, *a: (asked.extend(prompts), say(self, prompts, *a))[1]
    )
    commands.run_attack(
        str(folder / "out"),
        forget=str(folder / "data" / "facts.jsonl"),
        out=tmp_path / "attack",
        base=str(folder / "base"),
        attacks="direct",
        max_new_tokens=2,
        device="cpu",
    )
    words = [word_tokenizer().decode(prompt).split() for prompt in asked]
    assert len(words) == 4 and all(word in each and usual not in each for each in words), "the base's, too"
    ((name, value),) = options.items()
    assert json.loads((tmp_path / "attack" / "manifest.json").read_text())[name] == value


@pytest.mark.parametrize(
    "name, changed", [("plain_template", "ignore {question}"), ("chat_template_kwargs", {"x": 1})]
)
def test_a_folder_with_other_prompts_is_refused_by_name(tmp_path, name, changed):
    (tmp_path / "facts.jsonl").write_text('{"question": "who is ada ?", "answer": "a poet"}\n')
    model, tokenizer, suite = tiny(), word_tokenizer(), read_suite(SUITE, "own")
    how = {"out": tmp_path / "eval", "data": tmp_path}
    runner.evaluate(model, tokenizer, suite, **how)
    with pytest.raises(ValueError, match=f"holds results of another run: {name} was null and is"):
        runner.evaluate(model, tokenizer, suite, prompting=Prompting(**{name: changed}), **how)
    rows = read_attack_rows(forget_rows(1), "rows")
    options = {"options": AttackOptions(max_new_tokens=2)}
    attack_run.run_attacks(
        Target(model, tokenizer, rows, **options), out=tmp_path / "attack", attacks=["direct"]
    )
    other = Target(model, tokenizer, rows, prompting=Prompting(**{name: changed}), **options)
    with pytest.raises(ValueError, match=f"holds results of another run: {name} was null and is"):
        attack_run.run_attacks(other, out=tmp_path / "attack", attacks=["direct"])


def test_compared_logits_are_asked_as_it_was_trained(trained, tmp_path, monkeypatch):
    folder, options, _, _ = trained
    seen = []

    class Seen(PromptRenderer):
        def __init__(self, tokenizer, **how):
            seen.append(how)
            super().__init__(tokenizer, **how)

    monkeypatch.setattr(topk_change, "PromptRenderer", Seen)
    folder_of = [str(folder / "merged"), str(folder / "out")]
    write_topk(*folder_of, ["who is ada ?"], out=tmp_path, device="cpu")
    assert seen == [vars(Prompting(**options))]


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"chat_template_kwargs": {"date_string": date(2024, 7, 26)}},
            "chat_template_kwargs: wanted a mapping of plain",
        ),
        ({"chat_template_kwargs": ["no"]}, "chat_template_kwargs: wanted a mapping"),
        ({"plain_template": "Q: A:"}, "plain_template: wanted a text with {question}"),
    ],
)
def test_what_no_file_could_hold_is_refused_before_training(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **options)


def test_a_damaged_file_is_named(tmp_path):
    for text in ('{"plain": 1}', "[" * 100_000):
        (tmp_path / "prompting.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"prompting\.json: wanted plain_template and chat_template_kwargs"
        ):
            Prompting.of(tmp_path)


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_model_of_the_hub_that_cannot_be_reached_is_not_silently_asked_otherwise(
    tmp_path, monkeypatch, caplog, asked_before
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = f"somebody/asked-{asked_before}"
    folder = tmp_path / f"models--somebody--asked-{asked_before}"
    files = {"refs/main": "1234", **({".no_exist/1234/prompting.json": ""} if asked_before else {})}
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(text)
    assert Prompting.saved_with(name) is None
    said = f"{name}: whether it has a prompting.json is not known, because the Hub could not be reached"
    assert (said in caplog.text) != asked_before
