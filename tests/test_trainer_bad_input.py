"""One table of what users get wrong: each an error that names the argument, what came and what was wanted.

Nothing may be left behind: a refused run makes no output folder.
"""

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from tiny_models import forget_rows, quick, retain_rows, tiny, word_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from duet import DuetConfig, DuetTrainer

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
SMALL_T5 = T5Config(vocab_size=128, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
CHAT = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "ada"}]


def attached():
    model = tiny()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model


def no_pad_no_end():
    return word_tokenizer(chat_template=None, pad=False, eos_token=None)


# name -> (what is changed, exception, words that its message must have). Keys with a capital go to the trainer.
CASES = {
    # options
    "objective misspelt": (
        {"objective": "duett"},
        ValueError,
        r"objective: .*got 'duett' \(did you mean 'duet'\?\)",
    ),
    "objective of another kind": ({"objective": 3}, ValueError, r"objective: wanted one of .*got 3"),
    "positions misspelt": (
        {"positions": "answers"},
        ValueError,
        r"positions: .*'answers' \(did you mean 'answer'\?\)",
    ),
    "answer_source unknown": ({"answer_source": "student"}, ValueError, "answer_source: wanted one of"),
    "reverse_prompt_role unknown": ({"reverse_prompt_role": "sistem"}, ValueError, "did you mean 'system'"),
    "k is 0": ({"k": 0}, ValueError, "k: wanted an integer >= 1, got 0"),
    "k is a fraction": ({"k": 2.5}, ValueError, "k: wanted an integer >= 1, got 2.5"),
    "k is a bool": ({"k": True}, ValueError, "k: wanted an integer"),
    "k above the vocabulary": ({"k": 129}, ValueError, "k: wanted at most the vocabulary's 128, got 129"),
    "k above the vocabulary, without a steered teacher": (
        {"objective": "npo_kl", "k": 129},
        ValueError,
        "k: wanted at most the vocabulary's 128, got 129",
    ),
    "temperature 0": (
        {"objective": "duet_jsd", "temperature": 0},
        ValueError,
        "temperature: wanted a number > 0",
    ),
    "temperature NaN": (
        {"objective": "duet_jsd", "temperature": float("nan")},
        ValueError,
        "temperature: wanted",
    ),
    "temperature on raw logits": (
        {"temperature": 2.0},
        ValueError,
        "temperature: objective 'duet' compares raw logits",
    ),
    "normalization on raw logits": ({"normalization": "tail"}, ValueError, "normalization: objective 'duet'"),
    "clip on raw logits": ({"clip": 0.1}, ValueError, "clip: objective 'duet' compares raw logits"),
    "clip of terms that may be negative": (
        {"objective": "duet_kl", "clip": 0.1, "normalization": "truncated"},
        ValueError,
        "clip: wanted None, got 0.1, because with normalization 'truncated'",
    ),
    "clip of terms of a zeroed teacher": (
        {"objective": "duet_kl", "clip": 0.1, "normalization": "zeroed"},
        ValueError,
        "clip: wanted None, got 0.1, because with normalization 'zeroed'",
    ),
    "clip 0": ({"objective": "duet_kl", "clip": 0}, ValueError, "clip: wanted a number > 0 or None, got 0"),
    "delta negative": ({"delta": -1.0}, ValueError, "delta: wanted a number > 0, got -1.0"),
    "beta at its end": ({"beta": 1.0}, ValueError, r"beta: wanted a number in \(0, 1\), got 1.0"),
    "npo_beta 0": ({"objective": "npo", "npo_beta": 0}, ValueError, "npo_beta: wanted a number > 0"),
    "retain_weight negative": ({"retain_weight": -0.5}, ValueError, "retain_weight: wanted a number >= 0"),
    "retain_per_forget a text": (
        {"retain_per_forget": "2"},
        ValueError,
        "retain_per_forget: wanted a number",
    ),
    "reverse_prompt_fraction above 1": (
        {"reverse_prompt_fraction": 1.5},
        ValueError,
        r"wanted a number in \[0, 1\]",
    ),
    "num_positions 0": ({"num_positions": 0}, ValueError, "num_positions: wanted an integer >= 1"),
    "max_length 0": ({"max_length": 0}, ValueError, "max_length: wanted an integer >= 1 or None"),
    "no prefixes": ({"steering_prefixes": []}, ValueError, r"steering_prefixes: wanted a list of at least 1"),
    "an empty prefix": (
        {"steering_prefixes": ["a", " "]},
        ValueError,
        r"steering_prefixes\[1\]: wanted a text",
    ),
    "a reverse prompt of another kind": ({"reverse_prompts": [None]}, ValueError, r"reverse_prompts\[0\]"),
    "plain_template without its place": (
        {"plain_template": "Q: A:"},
        ValueError,
        "plain_template: .*{question}",
    ),
    "columns to be removed": ({"remove_unused_columns": True}, ValueError, "remove_unused_columns: got True"),
    "label smoothing": (
        {"label_smoothing_factor": 0.1},
        ValueError,
        "label_smoothing_factor: got 0.1, wanted 0.0",
    ),
    "inputs of metrics": (
        {"include_for_metrics": ["inputs"]},
        ValueError,
        r"include_for_metrics: got .*, wanted \[\]",
    ),
    "metrics of batches": (
        {"batch_eval_metrics": True},
        ValueError,
        "batch_eval_metrics: got True, wanted False",
    ),
    "another sampler": (
        {"train_sampling_strategy": "sequential"},
        ValueError,
        "train_sampling_strategy: got",
    ),
    "split batches": (
        {"accelerator_config": {"split_batches": True}},
        ValueError,
        r"accelerator_config\.split_batches: got True, wanted False",
    ),
    "uneven batches": (
        {"accelerator_config": {"even_batches": False}},
        ValueError,
        r"accelerator_config\.even_batches: got False, wanted True",
    ),
    "dispatched batches": (
        {"accelerator_config": {"dispatch_batches": True}},
        ValueError,
        r"accelerator_config\.dispatch_batches: got True, wanted None or False",
    ),
    "an output folder that is a file": (
        {"output_dir": "FILE"},
        NotADirectoryError,
        "output_dir: .*is a file",
    ),
    "arguments of another trainer": ({"Args": object()}, TypeError, "args: wanted a DuetConfig, got object"),
    "fp16 on a CPU": ({"fp16": True}, ValueError, "fp16: wanted False, got True, because accelerate"),
    "half a step": ({"max_steps": 2.5}, ValueError, "max_steps: wanted an integer, got 2.5"),
    "no seed": ({"seed": None}, ValueError, "seed: wanted an integer, got None"),
    # rows
    "no forget rows": (
        {"Forget_dataset": []},
        ValueError,
        r"forget_dataset: wanted at least one row, got none",
    ),
    "no whole batch in an epoch": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 13},
        ValueError,
        r"dataloader_drop_last: .* 12 rows, .* \(13\); or a smaller per_device_train_batch_size",
    ),
    "no retain rows": (
        {"Retain_dataset": []},
        ValueError,
        r"retain_dataset: wanted at least one row, got none",
    ),
    "no eval rows": ({"Eval_dataset": []}, ValueError, r"eval_dataset: wanted at least one row, got none"),
    "the best of several losses": (
        {
            "Eval_dataset": {"forget": forget_rows(), "retain": retain_rows()},
            "load_best_model_at_end": True,
            "save_strategy": "epoch",
            "eval_strategy": "epoch",
        },
        ValueError,
        "metric_for_best_model: wanted one of eval_forget_loss, eval_retain_loss, got 'loss'",
    ),
    "a single row": (
        {"Forget_dataset": {"question": "who ?"}},
        TypeError,
        "forget_dataset: wanted a list of rows",
    ),
    "a set of several splits": (
        {
            "Forget_dataset": DatasetDict(
                train=Dataset.from_list(forget_rows()), test=Dataset.from_list(forget_rows())
            )
        },
        TypeError,
        "forget_dataset: wanted one list of rows, got a DatasetDict of 'train', 'test'; give one",
    ),
    "several turns without a chat template": (
        {
            "Processing_class": word_tokenizer(chat_template=None),
            "Retain_dataset": [{"messages": [*CHAT, CHAT[0]]}],
        },
        ValueError,
        r"^retain_dataset\[0\]: the tokenizer has no chat template, which a conversation of \['user', 'assistant', 'user'\]",
    ),
    "a stream": ({"Forget_dataset": iter(forget_rows())}, TypeError, "forget_dataset: .*streaming"),
    "a row that is a text": (
        {"Forget_dataset": ["who ?"]},
        TypeError,
        r"forget_dataset\[0\]: wanted a dict, got str",
    ),
    "a row without a question": (
        {"Forget_dataset": [*forget_rows(2), {"text": "who ?"}]},
        ValueError,
        r"forget_dataset\[2\]: wanted exactly one of 'question', 'prompt' and 'messages', got the keys \['text'\]",
    ),
    "a row with two questions": (
        {"Retain_dataset": [{"question": "a", "prompt": "b"}]},
        ValueError,
        r"retain_dataset\[0\]: .*got question and prompt",
    ),
    "an empty question": (
        {"Forget_dataset": [{"question": " "}]},
        ValueError,
        r"\['question'\]: wanted a text",
    ),
    "two answers": (
        {"Retain_dataset": [{"question": "a", "answer": "b", "completion": "c"}]},
        ValueError,
        "at most one of 'answer' and 'completion'",
    ),
    "an answer and an assistant message": (
        {"Retain_dataset": [{"messages": CHAT, "answer": "b"}]},
        ValueError,
        "a last assistant message and 'answer'",
    ),
    "an answer that is a number": ({"Retain_dataset": [{"question": "a", "answer": 4}]}, ValueError, "got 4"),
    "messages that are a text": (
        {"Retain_dataset": [{"messages": "who ?"}]},
        TypeError,
        "wanted a list of messages",
    ),
    "a message without a role": ({"Retain_dataset": [{"messages": [{"content": "a"}]}]}, TypeError, "'role'"),
    "a chat that does not end with the user": (
        {"Retain_dataset": [{"messages": [CHAT[0], CHAT[1], CHAT[1]]}]},
        ValueError,
        r"ends with a user message, got roles \['user', 'assistant'\]",
    ),
    "a prefix without its subject": (
        {"Forget_dataset": [*forget_rows(2), {"question": "who ?"}]},
        ValueError,
        r"forget_dataset\[2\]: the steering prefix .* names {subject}, but the row has no 'subject'",
    ),
    "ga without answers": (
        {"objective": "ga", "Forget_dataset": forget_rows(answers=False)},
        ValueError,
        r"forget_dataset\[0\]: wanted a row with an 'answer'",
    ),
    "npo without retain answers": (
        {"objective": "npo", "Retain_dataset": retain_rows(answers=False)},
        ValueError,
        r"retain_dataset\[0\]: wanted a row with an 'answer'",
    ),
    "dataset answers that are not there": (
        {"positions": "answer", "answer_source": "dataset", "Forget_dataset": forget_rows(answers=False)},
        ValueError,
        r"forget_dataset\[0\]: wanted a row with an 'answer'",
    ),
    "a prompt that is too long": (
        {"max_length": 16},
        ValueError,
        r"forget_dataset\[0\]: the steered prompt and answer have 18 tokens, more than max_length=16",
    ),
    "a prompt longer than the model reads": (
        {"steering_prefixes": ["nothing " * 300]},
        ValueError,
        "more than max_length=256; they are refused, because a cut would remove the steering prefix",
    ),
    "no room for the teacher's answer": (
        {"positions": "answer", "max_answer_tokens": 300},
        ValueError,
        r"the steered prompt and answer have 317 tokens, more than max_length=256",
    ),
    # models and tokenizers
    "a missing model folder": (
        {"Model": "/nowhere/model"},
        FileNotFoundError,
        "model: there is no folder '/nowhere",
    ),
    "a missing teacher folder": (
        {"Teacher_model": "./nowhere"},
        FileNotFoundError,
        "teacher_model: there is no folder './nowhere'",
    ),
    "a folder without a model": (
        {"Model": "EMPTY"},
        FileNotFoundError,
        "model: .*is not a folder with a causal",
    ),
    "a model of another kind": (
        {"Model": 7},
        TypeError,
        "model: wanted a model, or the name or folder of one, got int",
    ),
    "a module that is no language model": (
        {"Model": torch.nn.Linear(2, 2)},
        TypeError,
        "model: Linear has no output",
    ),
    "an encoder-decoder with a new adapter": (
        {"Model": T5ForConditionalGeneration(SMALL_T5), "Peft_config": LORA},
        TypeError,
        "model: wanted a decoder-only language model, got the encoder-decoder T5For",
    ),
    "no tokenizer": ({"Processing_class": None}, ValueError, "processing_class: wanted a tokenizer"),
    "no pad and no end token": (
        {"Processing_class": no_pad_no_end()},
        ValueError,
        "processing_class: .*neither",
    ),
    "a teacher with another vocabulary": (
        {"Teacher_model": tiny(vocab_size=160)},
        ValueError,
        "teacher_model: wanted the model's vocabulary of 128 ids, got 160",
    ),
    "the student as its teacher": (
        {"Teacher_model": "STUDENT"},
        ValueError,
        "teacher_model: wanted another model",
    ),
    "a teacher that is not asked": (
        {"objective": "ga", "Teacher_model": tiny(seed=1)},
        ValueError,
        "teacher_model: wanted None, because objective 'ga' has no teacher",
    ),
    "an adapter of another kind": (
        {"Peft_config": {"r": 4}},
        TypeError,
        "peft_config: wanted a peft.PeftConfig",
    ),
    "an adapter on an adapter": (
        {"Model": get_peft_model(tiny(), LORA), "Peft_config": LORA},
        ValueError,
        "peft_config: wanted None, because model is a PEFT model",
    ),
    "an adapter that trains biases of its teacher": (
        {"Model": tiny("phi"), "Peft_config": LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only")},
        ValueError,
        r"peft_config \(adapter.bias\): wanted 'none', got 'lora_only'",
    ),
    "an adapter that is not to be trained": (
        {"Peft_config": LoraConfig(r=2, target_modules=["q_proj"], inference_mode=True)},
        ValueError,
        r"peft_config \(adapter.inference_mode\): wanted False, got True",
    ),
    "a frozen model": (
        {"Model": tiny().requires_grad_(False)},
        ValueError,
        "model: wanted weights that can be trained, got none",
    ),
    "an optimizer of what is not trained": (
        {
            "Model": (base := tiny()),
            "Optimizers": (torch.optim.SGD(base.parameters()), None),
            "Peft_config": LORA,
        },
        ValueError,
        "optimizers: wanted an optimizer of weights that are trained, got one that holds none",
    ),
    "an adapter of transformers that is to be trained": (
        {"Model": attached},
        ValueError,
        "model: wanted one without an adapter of add_adapter .* as peft_config",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, tmp_path):
    change, error, message = CASES[case]
    out = tmp_path / "out"
    options = quick(out)
    arguments = {
        "model": tiny(),
        "forget_dataset": forget_rows(),
        "retain_dataset": retain_rows(),
        "processing_class": word_tokenizer(),
    }
    arguments |= {name.lower(): value for name, value in change.items() if name[0].isupper()}
    options |= {name: value for name, value in change.items() if not name[0].isupper()}
    (tmp_path / "empty").mkdir()
    for name, value in arguments.items():
        if isinstance(value, str) and value in ("EMPTY", "STUDENT"):
            arguments[name] = str(tmp_path / "empty") if value == "EMPTY" else arguments["model"]
        elif value is attached:
            arguments[name] = attached()
    if options["output_dir"] == "FILE":
        options["output_dir"] = str(tmp_path / "file" / "out")
        (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        DuetTrainer(**{"args": DuetConfig(**options)} | arguments)
    assert not out.exists()


def test_the_table_has_a_good_run(tmp_path):
    """What every case changes is right to begin with."""
    args = DuetConfig(**quick(tmp_path))
    DuetTrainer(tiny(), args, forget_rows(), retain_rows(), word_tokenizer())


def test_k_may_be_the_whole_vocabulary(tmp_path):
    args = DuetConfig(**quick(tmp_path, k=128))
    DuetTrainer(tiny(), args, forget_rows(), retain_rows(), word_tokenizer())


def test_without_a_pad_token_the_end_token_pads(tmp_path):
    """The attention mask hides padding: the losses are those of a tokenizer with a pad token, to the last bit."""
    runs = []
    for pad in (True, False):
        args = DuetConfig(**quick(tmp_path, max_steps=2))
        trainer = DuetTrainer(tiny(), args, forget_rows(), retain_rows(), word_tokenizer(pad=pad))
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[0] == runs[1]
