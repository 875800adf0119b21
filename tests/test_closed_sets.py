"""What is not known is named, with a way out: options of generation, heads, columns, cells, templates, placeholders, tokens."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_cli import said
from test_trainer import make
from tiny_models import NO_SYSTEM_TEMPLATE, forget_rows, tiny, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    RecurrentGemmaConfig,
)

from duet import DuetConfig, DuetTrainer
from duet.data.prompts import PromptRenderer
from duet.data.rows import read_rows
from duet.data.sources import DataSource, load_rows, read_table
from duet.evaluation.commands import run_attack
from duet.model.answers import generate_answers
from duet.model.lm import check_head
from duet.run.config_file import RunConfig
from duet_kernels import LMHead

IDS = torch.arange(3, 9)[None]
PROMPTS = [[1, 5, 9, 11], [1, 5, 9, 11, 30, 31]]


# -- generation ------------------------------------------------------------------------------------------------------


def answers(model):
    return generate_answers(model, PROMPTS, word_tokenizer(), 0, 6)


@pytest.mark.parametrize(
    "kept",
    [
        {"suppress_tokens": "first"}, {"bad_words_ids": "first"}, {"sequence_bias": "first"}, {"guidance_scale": 3.0},
        {"min_new_tokens": 6, "eos_token_id": 2}, {"forced_bos_token_id": 5}, {"forced_eos_token_id": 2}, {"num_beams": 3},
        {"num_return_sequences": 2}, {"do_sample": True, "temperature": 9.0}, {"max_length": 7}, {"max_time": 1e-4},
        {"stop_strings": ["paris"]}, {"prompt_lookup_num_tokens": 2}, {"repetition_penalty": 5.0}, {"penalty_alpha": 0.6},
        {"encoder_no_repeat_ngram_size": 1}, {"exponential_decay_length_penalty": (1, 5.0)}, {"output_scores": True},
        {"return_dict_in_generate": True}, {"renormalize_logits": True}, {"remove_invalid_values": True},
    ],
    ids=lambda kept: next(iter(kept)),
)  # fmt: skip
def test_greedy_is_greedy_whatever_a_checkpoint_carries(kept):
    """Below an adapter, which finds the settings of generation in its base."""
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    greedy = answers(model)
    first = greedy[0][0]
    given = {"suppress_tokens": [first], "bad_words_ids": [[first]], "sequence_bias": [[[first], -50.0]]}
    for name, value in kept.items():
        setattr(model.generation_config, name, given[name] if value == "first" else value)
    before = model.generation_config
    assert answers(model) == greedy
    assert model.generation_config is before


# -- heads -----------------------------------------------------------------------------------------------------------

C = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
SMALL = {"vocab_size": 128, "hidden_size": 32}
HEADS = {
    "llama": lambda: LlamaConfig(**C),
    "a field of another model type": lambda: LlamaConfig(**C, logit_scale=3.0, final_logit_softcapping=1.0),
    "cohere": lambda: CohereConfig(**C, logit_scale=0.25),
    "cohere2": lambda: Cohere2Config(**C, logit_scale=0.25, head_dim=8),
    "granite divides": lambda: GraniteConfig(**C, logits_scaling=4.0),
    "hyperclovax multiplies": lambda: HyperCLOVAXConfig(**C, num_key_value_heads=2, head_dim=8, logits_scaling=4.0),
    "recurrent gemma": lambda: RecurrentGemmaConfig(
        **C | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=16, logits_soft_cap=5.0
    ),
    "mpt": lambda: MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=128, max_seq_len=64, logit_scale="inv_sqrt_d_model"),
    "gpt2": lambda: GPT2Config(vocab_size=128, n_embd=32, n_head=4, n_layer=2),
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=64, num_attention_heads=4, num_hidden_layers=2, word_embed_proj_dim=32),
    "bloom": lambda: BloomConfig(**SMALL, n_head=4, n_layer=2),
}  # fmt: skip


def built(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return model


@pytest.mark.parametrize("make_config", HEADS.values(), ids=HEADS.keys())
def test_the_head_is_the_models_own(make_config):
    model = built(make_config())
    head = LMHead.verify(model, IDS)
    assert check_head(model).scale == head.scale


@pytest.mark.parametrize("kind", ["somebodys_model", None, "minicpm3"])
def test_an_unknown_model_type_is_refused_by_name(kind):
    model = tiny()
    model.config.model_type = kind
    with pytest.raises(TypeError, match=rf"LlamaForCausalLM \(model type {kind!r}\).*by hand.*LMHead.verify"):
        LMHead.of(model)
    by_hand = LMHead(model.get_output_embeddings().weight)
    assert LMHead.verify(model, IDS, by_hand) is by_hand


def test_what_holds_a_model_or_is_held_by_one_is_no_model():
    model = tiny()
    with pytest.raises(TypeError, match=r"DataParallel has no output embeddings; pass its \.module,"):
        LMHead.of(torch.nn.DataParallel(model))
    for part, name in ((model.model, "LlamaModel"), (model.lm_head, "Linear")):
        with pytest.raises(
            TypeError, match=rf"{name} has no .* pass the causal language model, not its backbone"
        ):
            LMHead.of(part)


@pytest.mark.parametrize(
    "wrong", [{"scale": 1.01}, {"scale": 1.0001}, {"softcap": 30.0}, {"vocab_size": 100, "scale": 2.0}]
)
def test_a_head_made_by_hand_is_compared(wrong):
    model = tiny()
    with pytest.raises(ValueError, match="head: its logits are not those of LlamaForCausalLM"):
        LMHead.verify(model, IDS, LMHead(model.get_output_embeddings().weight, **wrong))


def test_a_head_without_some_of_the_models_rows_is_refused():
    """`vocab_size` may leave out ids; a weight that lacks them is another model's."""
    model = tiny()
    weight = model.get_output_embeddings().weight
    with pytest.raises(
        ValueError, match=r"^head: gives logits of shape \[.*, 5\], the model gives \[.*, \d+\]"
    ):
        LMHead.verify(model, IDS, LMHead(weight[:5]))
    with pytest.raises(ValueError, match=r"^head: reads 3 numbers a token, the output layer of Llama"):
        LMHead.verify(model, IDS, LMHead(weight[:, :3]))
    assert LMHead.verify(model, IDS, weight).weight is weight  # a bare weight is a head
    assert LMHead.verify(model, IDS, LMHead(weight, vocab_size=5)).num_ids == 5


def test_an_output_layer_without_a_weight_is_refused():
    model = tiny()
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(TypeError, match=r"Sequential \(weight NoneType\), not a plain torch.nn.Linear"):
        LMHead.of(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_head_is_verified_in_its_dtype(dtype):
    LMHead.verify(tiny("gemma2").to(dtype), IDS)


def test_an_output_layer_that_is_not_called_is_said():
    model = tiny()
    inner = model.forward
    model.forward = lambda *args, **kwargs: (model.lm_head(torch.zeros(1, 32)), inner(*args, **kwargs))[1]
    with pytest.raises(ValueError, match="wanted one call of the output layer"):
        LMHead.verify(model, IDS)


# -- files -----------------------------------------------------------------------------------------------------------


def csv_of(tmp_path, text):
    path = tmp_path / "forget.csv"
    path.write_text(text)
    return load_rows(DataSource(str(path)), "data.forget")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "question,answer\nWho, if anyone?,a\n",
            r"line 2: wanted 2 cells \(question, answer\), got 3; .* between quotes",
        ),
        ("question,answer\nok ?,a\nWho?\n", "line 3: wanted 2 cells .* got 1"),
        ('question,answer\n"two\nlines",a\nWho, me?,a\n', "line 4: wanted 2 cells .* got 3"),
        ('question,answer\n"Who?,a\nNext?,b\n', "line 2: not CSV: unexpected end of data"),
        ('question,answer\n"Who"is?,a\n', "line 2: not CSV: "),
        ("question,question\nWho?,a\n", "line 1: wanted a different name for every column"),
        ("question,\nWho?,a\n", "line 1: wanted a different name for every column"),
        (
            "question;answer\nWho?;a\n",
            "wanted cells between commas, got the one column 'question;answer'; save the file with commas",
        ),
    ],
)
def test_a_csv_row_of_another_shape_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        csv_of(tmp_path, text)


def test_a_csv_of_every_lawful_shape_is_read(tmp_path):
    long = "x " * 200_000
    text = f'question , answer\r\n"Who, ""if"" anyone?",\r\n\r\n"two\nlines",{long}\r\n'
    rows = csv_of(tmp_path, text)
    assert rows == [
        {"question": 'Who, "if" anyone?', "answer": None},
        {"question": "two\nlines", "answer": long},
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"instruction": "who ?", "output": "x"},
            r"got instruction, output; .*columns: \{question: instruction, answer: output\}",
        ),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"columns: \{messages: conversations\}"),
        ({"Question": "who ?", "answer": "x"}, r"got Question, answer; .*columns: \{question: Question\}"),
        ({"prompts": "who ?"}, r"columns: \{prompt: prompts\}"),
    ],
)
def test_other_columns_are_named(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"data.forget\[0\]: wanted a column 'question', .*" + message):
        load_rows(DataSource(str(tmp_path / "rows.jsonl")), "data.forget")
    assert read_table(tmp_path / "rows.jsonl", "a suite") == [row], "a suite names its columns itself"


def test_a_data_frame_says_how_it_becomes_rows():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{"question": "who ?"}])
    with pytest.raises(
        TypeError, match=r"forget_dataset: wanted a list of rows, got a DataFrame; its .to_dict\('records'\)"
    ):
        read_rows(frame, "forget_dataset")
    assert len(read_rows(frame.to_dict("records"), "forget_dataset")) == 1


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokens_that_the_model_does_not_have_are_named(tmp_path):
    tokenizer = word_tokenizer()
    small = {"vocab_size": len(tokenizer)}
    tokenizer.add_tokens(["zorblat"])
    row = {"question": "who ?", "subject": "ada", "answer": "yes"}
    named = r"the token 'zorblat' has the id \d+, but the model embeds .*resize_token_embeddings"
    for place in ("question", "answer"):
        rows = [row, row | {place: "zorblat"}]
        args = make(tmp_path, positions="answer", answer_source="dataset", objective="npo").args
        args.objective = "npo"
        with pytest.raises(ValueError, match=rf"forget_dataset\[1\]: {named}"):
            DuetTrainer(tiny(**small), args, rows, processing_class=tokenizer)
    make(tmp_path, tiny(**small), trainer_options={"processing_class": tokenizer})
    tokenizer.pad_token = "zorblat"
    with pytest.raises(
        ValueError, match=r"processing_class: its token 'zorblat' .*pad_token = tokenizer.eos_token"
    ):
        make(tmp_path, tiny(**small), trainer_options={"processing_class": tokenizer})


def test_a_processor_is_no_tokenizer(tmp_path):
    from transformers import ProcessorMixin

    class Processor(ProcessorMixin):
        def __init__(self):
            self.tokenizer = word_tokenizer()

    with pytest.raises(TypeError, match=r"wanted a tokenizer, got a Processor; its .tokenizer is one"):
        make(tmp_path, trainer_options={"processing_class": Processor()})


# -- templates and placeholders --------------------------------------------------------------------------------------

ALTERNATING = NO_SYSTEM_TEMPLATE.replace(
    "{% if m['role'] == 'system' %}", "{% if loop.index0 % 2 != (m['role'] != 'user') | int %}"
)
USER = {"role": "user", "content": "who is ada lovelace ?"}


@pytest.mark.parametrize(
    "template, messages",
    [
        (NO_SYSTEM_TEMPLATE, [{"role": "system", "content": "a code"}, USER]),
        (ALTERNATING, [USER, USER]),
        ("{{ messages[1].content.nothing.at.all }}{{ messages[0].content }}", [USER]),
        ("{{ messages[0].content }}{% for x in y.z %}{% endfor %}", [USER]),
    ],
)
@pytest.mark.parametrize("place", ["forget_dataset", "retain_dataset"])
def test_a_row_that_the_template_refuses_is_named(tmp_path, template, messages, place):
    good = [{"question": "who ?", "subject": "ada"}] if template in (NO_SYSTEM_TEMPLATE, ALTERNATING) else []
    rows = {"forget_dataset": [{"prompt": "ada", "subject": "ada"}], "retain_dataset": []}
    rows[place] = [*good, {"messages": messages, "subject": "ada"}]
    rows["retain_dataset"] = rows["retain_dataset"] or None
    named = rf"{place}\[{len(good)}\]: the tokenizer's chat template refuses a conversation of the roles"
    with pytest.raises(ValueError, match=named):
        DuetTrainer(tiny(), make(tmp_path).args, processing_class=word_tokenizer(template), **rows)


def test_a_template_must_show_the_question():
    with pytest.raises(
        ValueError, match="processing_class: wanted a chat template that shows the user's message"
    ):
        PromptRenderer(word_tokenizer("{{ bos_token }}<assistant>"))


@pytest.mark.parametrize(
    "option, text",
    [
        ("steering_prefixes", "forget {subjct}"),
        ("steering_prefixes", "forget {subject}, {name}"),
        ("steering_prefixes", "forget { subject }"),
        ("steering_prefixes", "forget {Subject}"),
        ("reverse_prompts", "tell all of {subject}"),
        ("prefills", "{subject} is"),
        ("refusals", "{subject}? no"),
        ("plain_template", "Q: {question} {subject}"),
    ],
)
def test_a_placeholder_that_nothing_replaces_is_refused(tmp_path, option, text):
    value = text if option == "plain_template" else ["fine", text]
    with pytest.raises(ValueError, match=rf"{option}.*: there is no placeholder"):
        DuetConfig(output_dir=str(tmp_path), use_cpu=True, **{option: value})


def test_braces_that_are_no_placeholder_may_stand(tmp_path):
    DuetConfig(
        output_dir=str(tmp_path), use_cpu=True, steering_prefixes=['forget {subject}: {"a": {}} {} {a b}']
    )


# -- options, and the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"data": {"forget": ""}}, "data.forget.path: wanted a text that is not empty"),
        ({"data": {"forget": "a.jsonl", "retain": {"path": " "}}}, "data.retain.path: wanted a text"),
        ({"data": {"forget": "a.jsonl", "eval": {"x": ""}}}, "data.eval.x.path: wanted a text"),
        ({"model": ""}, "model.name: wanted a text"),
        ({"model": {"name": "m", "tokenizer": ""}}, "model.tokenizer: wanted a text"),
        ({"teacher": ""}, "teacher: wanted a text"),
    ],
)
def test_an_empty_text_is_no_path(tree, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.of({"model": "m", "data": {"forget": "a.jsonl"}, "training": {"use_cpu": True}} | tree)


def test_a_tracker_that_is_not_there_is_said_at_once(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    for wanted in ("wandb", ["tensorboard", "wandb"]):
        with pytest.raises(
            ValueError, match=r"report_to: 'wandb' needs its package, .*pip install wandb.* is: tensorboard"
        ):
            DuetConfig(output_dir=str(tmp_path), use_cpu=True, report_to=wanted)
    with pytest.raises(ValueError, match=r"report_to: .*did you mean 'wandb'"):
        DuetConfig(output_dir=str(tmp_path), use_cpu=True, report_to="wandbb")


def test_predict_takes_rows(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    found = trainer.predict(forget_rows(2))
    assert found.metrics["test_loss"] == pytest.approx(trainer.evaluate(forget_rows(2))["eval_loss"])
    with pytest.raises(ValueError, match=r"^test_dataset\[0\]"):
        trainer.predict([{"text": "x"}])


@pytest.mark.parametrize(
    "asked, given, why",
    [
        ("evaluate", None, "^eval_dataset: wanted rows, here or in DuetTrainer"),
        ("evaluate", "2021", "^eval_dataset.2021: there is no such key .did you mean '2020'"),
        ("predict", {"forget": forget_rows(1)}, "^test_dataset: wanted a list of rows .* got dict"),
        ("in_context", forget_rows(1), "^eval_dataset: wanted none, objective 'in_context' has no loss"),
    ],
    ids=["no rows", "no such name", "a dict", "no loss"],
)
def test_what_cannot_be_evaluated_is_named(tmp_path, asked, given, why):
    steers = asked == "in_context"
    options = {"objective": asked} if steers else {}
    rows = {} if steers or given is None else {"trainer_options": {"eval_dataset": {2020: forget_rows(1)}}}
    trainer = make(tmp_path, **options, **rows)
    with pytest.raises((TypeError, ValueError), match=why):
        getattr(trainer, "evaluate" if steers else asked)(given)
    assert not rows or "eval_2020_loss" in trainer.evaluate()


def test_the_command_line_says_one_sentence_and_shows_more_when_asked(monkeypatch, capsys, tmp_path):
    def break_with(error):
        def merge_adapter(*args):
            raise error

        monkeypatch.setattr("duet.run.commands.merge_adapter", merge_adapter)

    for error, code, words in (
        (ValueError("out: wanted x"), 2, "error: out: wanted x"),
        (
            IndexError("list index out of range"),
            1,
            "IndexError: list index out of range (not expected; `duet --debug",
        ),
        (TypeError("f() takes 1"), 1, "TypeError: f() takes 1 (not expected"),
        (RuntimeError("teacher: it changed"), 2, "error: teacher: it changed"),
    ):
        break_with(error)
        status, printed = said(monkeypatch, capsys, "merge", tmp_path, "--out", tmp_path)
        assert status == code and words in printed.err and "Traceback" not in printed.err
        monkeypatch.setattr("sys.argv", ["duet", "--debug", "merge", str(tmp_path), "--out", str(tmp_path)])
        with pytest.raises(type(error)):
            from duet import cli

            cli.main()


def test_eval_and_attack_mark_rows_that_the_template_refuses(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    word_tokenizer(ALTERNATING).save_pretrained(tmp_path / "model")
    rows = [
        {"question": "who is ada ?", "answer": "a poet"},
        {"messages": [USER, USER], "answer": "a poet"},
    ]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "attack"
    run_attack(
        str(tmp_path / "model"),
        forget=str(tmp_path / "forget.jsonl"),
        out=out,
        device="cpu",
        attacks="direct,membership,rank_probe,prefill",
    )
    report = json.loads((out / "attacks.json").read_text())
    status = report["direct"]["variants"]["as asked"]["status"]
    assert status["refused_by_template"] == 1 and sum(status.values()) == 2
