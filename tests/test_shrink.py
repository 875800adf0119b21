"""A trained adapter is made smaller as far as the model still forgets: which size is chosen, and what is written."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import capital_rows, tiny, word_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from duet import cli
from duet.evaluation import generation
from duet.evaluation.attacks.rows import read_attack_rows
from duet.evaluation.generation import Continuation
from duet.evaluation.models import load
from duet.evaluation.steering import share_of
from duet.model.adapters import adapter_layers, logits_of
from duet.model.shrinking import AdapterSize
from duet.run.shrink import Shrunk, Tried, shrink, verdict

REFUSES = "I don't know anything about that"
FORGET = capital_rows("france", "paris", "one", "two", "three")
RETAIN = capital_rows("spain", "madrid", "one", "two")


def adapted(model=None, **options):
    torch.manual_seed(1)
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "down_proj", "embed_tokens"], "init_lora_weights": False}
        | options
    )
    return get_peft_model(model or tiny(), config)


def size_of(model):
    layer = adapter_layers(model)[0]
    return layer.scaling["default"] * 4 / layer.lora_alpha["default"]


def scripted(model, tokenizer, prompts, seed=None, **_):
    """What is forgotten comes back plainly below 0.35, by drawing below 0.45, behind a prefill at 0.6; a neighbour is lost above 0.8; row three is never told."""
    size, said = size_of(model), []
    for prompt in prompts:
        text = tokenizer.decode(prompt)
        plain = text.rstrip().endswith("<assistant>") and text.count("<user>") == 1
        if "spain" in text:
            truth = "it is madrid" if size < 0.85 or "one" in text else "it is paris"
        elif "three" in text:
            truth = "it is red"
        else:
            drawn = plain and seed is not None
            truth = "it is paris" if size < (0.45 if drawn else 0.35 if plain else 0.65) else REFUSES
        said.append(Continuation(truth, 3, True))
    return said


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(generation, "continuations", scripted)


def rows(*of):
    return read_attack_rows([row for each in of for row in each], "rows")


def test_the_size_that_keeps_most_and_tells_no_more_is_chosen(script):
    model = adapted()
    found = shrink(AdapterSize(model), word_tokenizer(), rows(FORGET), rows(RETAIN))
    assert [each.size for each in found.tried] == [1.0, 0.9, 0.8, 0.7, 0.6], (
        "0.6 tells, so that 0.5 is not tried"
    )
    assert [each.kept["share"] for each in found.tried] == [0.5, 0.5, 1.0, 1.0, 1.0]
    assert found.best.size == 0.8, "of equal ones the largest"
    last = found.tried[-1]
    assert (
        last.told["direct"]["share"] == 0
        and last.told["prefill"]["share"] == 1
        and last.refused["share"] == 1
    )
    assert last.told["direct"]["rows"] == 2, "the row that the base does not tell is left out"
    assert verdict(found).startswith("size 0.8: 2 of 2") and "at full size 1 of 2" in verdict(found)
    assert size_of(model) == 1 and "forgot little" not in verdict(found)


def test_rows_of_one_fact_count_as_one_in_the_interval(script):
    wordings = [
        row | {"question": f"{row['question']} {i}", "value": row["answer"]}
        for row in RETAIN[:1]
        for i in range(3)
    ]
    found = shrink(AdapterSize(adapted()), word_tokenizer(), rows(FORGET), rows(wordings), sizes=[])
    assert found.tried[0].kept == share_of([True]) | {"rows": 3}


def test_full_size_stays_where_a_smaller_one_tells_or_keeps_no_more(script):
    plain = rows(FORGET), rows(RETAIN)
    found = shrink(AdapterSize(adapted()), word_tokenizer(), *plain, sizes=[0.6])
    assert found.best.size == 1 and verdict(found).startswith("size 1: no smaller one")
    told_anyway = shrink(AdapterSize(adapted()), word_tokenizer(), *plain, sizes=[0.9, 0.2], most=0.99)
    assert [each.size for each in told_anyway.tried] == [1.0, 0.9, 0.2]
    assert told_anyway.best.size == 1, "0.2 tells all, and 0.9 keeps no more"
    drawn = shrink(AdapterSize(adapted()), word_tokenizer(), *plain, sizes=[0.4]).tried[-1].told
    assert drawn["direct"]["share"] == 0 and drawn["sampling"]["share"] == 1


def test_what_comes_back_at_full_size_may_come_back_at_a_smaller_one(script):
    found = shrink(
        AdapterSize(adapted()), word_tokenizer(), rows(FORGET[:1], RETAIN[:1]), rows(RETAIN[1:]), sizes=[0.8]
    )
    assert found.best.told["direct"]["share"] == 0.5, "the row about spain is told at every size"
    assert found.best.size == 0.8
    done = []
    found = shrink(AdapterSize(adapted()), word_tokenizer(), rows(RETAIN[:1]), rows(RETAIN[1:]), sizes=[0.8],
                   progress=lambda *step: done.append(step))  # fmt: skip
    assert (
        "At full size an attack brings back 1 of 1 (21 to 100 %) of its rows: the training forgot little"
        in verdict(found)
    )
    assert [step for step in done if step[0] == "size 0.8"] == [("size 0.8", n, 5) for n in range(6)]


def test_an_attack_that_succeeds_at_full_size_allows_no_other_one():
    def tried(size, direct, prefill, kept):
        told = {"direct": share_of(direct), "prefill": share_of(prefill)}
        return Tried(size, told, share_of([True]), share_of(kept))

    full = tried(1.0, [False, False], [True, True], [True, False])
    found = Shrunk([full, tried(0.5, [True, True], [True, True], [True, True])], most=0.1)
    assert found.allows(full) and not found.allows(found.tried[1]) and found.best is full


@pytest.mark.parametrize(("told", "said"), [(2, False), (3, True)])
def test_a_training_that_forgot_little_is_said(told, said):
    direct = share_of([i < told for i in range(4)])
    found = Shrunk([Tried(1.0, {"direct": direct}, share_of([False]), share_of([True]))], most=0.1)
    assert ("the training forgot little" in verdict(found)) is said


def test_answers_that_could_not_be_judged_are_said(monkeypatch):
    """They do not count as told; of a row that one drawn answer tells, the others need not be judged."""

    def cut_when_drawn(model, tokenizer, prompts, seed=None, **how):
        said = scripted(model, tokenizer, prompts, seed, **how)
        cut = Continuation("well , let me think", 3, True, limit=3)
        return (
            said
            if seed is None
            else [cut if "one" in tokenizer.decode(p) else s for p, s in zip(prompts, said, strict=True)]
        )

    monkeypatch.setattr(generation, "continuations", cut_when_drawn)
    given = word_tokenizer(), rows(FORGET), rows(RETAIN)
    found = shrink(AdapterSize(adapted()), *given, sizes=[0.8])
    assert found.best.unjudged == 0.5 and found.best.told["sampling"]["share"] == 0
    assert "Up to 50% of an attack's rows could not be judged" in verdict(found)
    drawn = shrink(AdapterSize(adapted()), *given, sizes=[0.4]).tried[-1]
    assert drawn.told["sampling"]["share"] == 0.5 and drawn.unjudged == 0.5
    monkeypatch.setattr(generation, "continuations", scripted)
    assert "judged" not in verdict(shrink(AdapterSize(adapted()), *given, sizes=[0.8]))


def test_the_adapter_is_at_full_size_after_an_error(script):
    model = adapted()
    with pytest.raises(ValueError, match="retain: wanted rows that the base tells"):
        shrink(AdapterSize(model), word_tokenizer(), rows(FORGET), rows(FORGET[2:]))
    assert size_of(model) == 1


@pytest.fixture
def trained(tmp_path):
    """Folders `base` and `full`, of a model and an adapter on it, and rows in `data`."""
    tiny().save_pretrained(tmp_path / "base")
    model = adapted(tiny())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "full")
    word_tokenizer().save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "run_record.json").write_text('{"override_wordings": ["answer !"]}')
    (tmp_path / "data").mkdir()
    for name, of in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    return tmp_path


def test_what_is_saved_is_the_adapter_at_that_size(trained):
    model, _ = load(trained / "full")
    size, logits = AdapterSize(model), {}
    for s in (0.0, 1.0, 0.5):
        size.set(s)
        logits[s] = logits_of(model)
    torch.testing.assert_close(logits[0.0], logits_of(load_base(trained)))
    size.save(0.5, trained / "full", trained / "half")
    word_tokenizer().save_pretrained(trained / "half")
    again, _ = load(trained / "half")
    torch.testing.assert_close(logits_of(again), logits[0.5])
    assert size_of(again) == 1, "a program that reads it need not know"
    assert all((logits[s] - logits[0.5]).abs().amax() > 0.1 for s in (0.0, 1.0))


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def run(*words):
    return CliRunner().invoke(cli.app, ["shrink", *map(str, words)])


def test_the_command_writes_a_folder_that_the_other_commands_read(trained, script):
    args = trained / "full", "--data", trained / "data", "--out", trained / "small"
    done = run(*args, "--sizes", "0.8,0.7")
    assert done.exit_code == 0, done.output
    assert "size 0.8: 2 of 2" in done.output and "chosen" in done.output
    small, full = (load(trained / name)[0] for name in ("small", "full"))
    AdapterSize(full).set(0.8)
    torch.testing.assert_close(logits_of(small), logits_of(full))
    assert json.loads((trained / "small" / "run_record.json").read_text())["override_wordings"] == [
        "answer !"
    ]
    assert "multiplied by 0.8" in (trained / "small" / "README.md").read_text()
    assert "small' is not empty; wanted a new folder" in str(run(*args).exception)


def test_bad_input_is_named(trained, script, monkeypatch):
    monkeypatch.setattr(
        "duet.run.shrink.load", lambda *_: pytest.fail("a model was loaded before the input was checked")
    )
    full, data, out = trained / "full", ("--data", trained / "data"), ("--out", trained / "small")
    for words, wanted in (
        ((full, *data, *out, "--sizes", "0.5,2"), "sizes: wanted numbers above 0 and at most 1, got 2"),
        ((full, *data, *out, "--most", "1"), "most: wanted a share"),
        ((trained / "base", *data, *out), "adapter: wanted a folder with a trained adapter"),
        ((full, "--data", trained, *out), "data: there is no file"),
        ((full, *data, "--out", full / "run_record.json"), "out: wanted a folder, but"),
        ((full, *data, "--out", trained / "data"), "data' is not empty; wanted a new folder"),
        ((full, *data, *out, "--batch-size", 0), "batch_size: wanted"),
        ((full, *data, *out, "--limit", -1), "limit: wanted an integer >= 1, got -1"),
    ):
        assert wanted in str(run(*words).exception), words
    (trained / "data" / "forget.jsonl").write_text('{"question": "who ?"}\n')
    said = str(run(full, *data, *out).exception)  # the command has no --elicit
    assert "wanted a row with an 'answer'" in said and "; duet elicit writes" in said and "--" not in said
    unknown = rows(FORGET[2:])
    with pytest.raises(
        ValueError, match="forget: wanted rows that the base tells, but it tells none of the 1"
    ):
        shrink(AdapterSize(adapted()), word_tokenizer(), unknown, rows(RETAIN))
    with pytest.raises(ValueError, match=r"adapter: wanted a plain LoRA adapter.* has use_dora=True"):
        AdapterSize(adapted(target_modules=["q_proj"], use_dora=True))
    assert not (trained / "small").exists()
