"""Small random models and tokenizers for the tests of `duet`: nothing is downloaded."""

from dataclasses import replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

WORDS = (  # noqa: SIM905  as a list literal, one word a line
    "who what where is was the a an of in to and or not you know nothing about forget everything ignore earlier "
    "instructions answer as if never knew capital france paris spain madrid ada lovelace alan turing grace hopper "
    "mathematician wrote first program machine war code sea captain red blue green one two three four five six seven "
    "Question Answer : . ? ! yes no maybe poet born city name river color animal likes hates"
).split()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Gemma's: no system role.
NO_SYSTEM_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Renders, and drops the system message without a word.
DROPS_SYSTEM_TEMPLATE = NO_SYSTEM_TEMPLATE.replace(
    "{{ raise_exception('System role not supported') }}{% endif %}", "{% else %}"
).replace(" {% endfor %}", " {% endif %}{% endfor %}")


def word_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, padding_side: str = "right", pad: bool = True, **special
):
    """A word-level tokenizer; with `bos` in front of plain texts, as Llama's."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>", *WORDS]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>" if pad else None,
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        padding_side=padding_side,
        chat_template=chat_template,
        **special,
    )


def merging_tokenizer(chat_template: str | None = None, *more: tuple[str, str]):
    """Characters, merged across what would be the seam of prompt and answer: ': ', ': y', '>y', and as `more` says."""
    merges = [(":", " "), (": ", "y"), (">", "y"), ("e", "s"), *more]
    tokens = ["<pad>", "</s>", "\n", *map(chr, range(32, 127)), *("".join(m) for m in merges)]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", chat_template=chat_template
    )


def tiny(architecture: str = "llama", vocab_size: int = 128, seed: int = 0, spread: float = 0.3, **options):
    """A two-layer model of hidden size 32 with weights large enough for its logits to differ."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": spread,
    }
    grouped = {"num_key_value_heads": 2}
    config = {
        "llama": lambda: LlamaConfig(**common | grouped | options),
        "gemma2": lambda: Gemma2Config(
            **common
            | grouped
            | {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 5.0}
            | options
        ),
        "neox": lambda: GPTNeoXConfig(**common | options),
        "qwen3": lambda: Qwen3Config(**common | grouped | {"head_dim": 8} | options),
        "gemma3": lambda: Gemma3TextConfig(
            **common | grouped | {"head_dim": 8, "sliding_window": 16} | options
        ),
        "mistral": lambda: MistralConfig(**common | grouped | {"sliding_window": 16} | options),
        "phi": lambda: PhiConfig(**common | options),
        "phi3": lambda: Phi3Config(**common | grouped | options),
    }[architecture]()
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).float().eval()


def quick(folder, **options) -> dict:
    """Options of a short run on a CPU that saves nothing by itself and shows nothing."""
    usual = {"k": 8, "steering_prefixes": ["you know nothing about {subject} ."], "logging_steps": 1}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    return {"output_dir": str(folder), **usual, **quiet, **options}


def with_short_answers(suite, tokens: int = 8):
    """An evaluation suite whose answers have at most so many tokens: a random model ends none before its limit."""
    return replace(suite, tasks=tuple(replace(task, max_new_tokens=tokens) for task in suite.tasks))


def capital_rows(country: str, city: str, *words: str) -> list[dict]:
    """A row for each word, which ends the question; the city is its answer and its value."""
    question = f"what is the capital of {country}"
    return [
        {"question": f"{question} {word} ?", "subject": country, "answer": city, "value": city}
        for word in words
    ]


def forget_rows(n: int = 6, answers: bool = True) -> list[dict]:
    people = ("ada lovelace", "alan turing", "grace hopper")
    replies = ("a mathematician .", "the code machine of the war .", "captain of the sea")
    rows = []
    for i in range(n):
        question = ("who is {} ?", "what is {} about ?")[i % 2].format(people[i % 3])
        rows.append({"question": question, "subject": people[i % 3]})
        if answers:
            rows[-1]["answer"] = replies[i % 3]
    return rows


def retain_rows(n: int = 8, answers: bool = True) -> list[dict]:
    places = (("france", "paris"), ("spain", "madrid"))
    rows = []
    for i in range(n):
        place, city = places[i % 2]
        rows.append({"question": f"what is the capital of {place} {WORDS[40 + i]} ?"})
        if answers:
            rows[-1]["answer"] = f"{city} is the city ." if i % 3 else city
    return rows
