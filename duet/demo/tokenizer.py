"""A word-level chat tokenizer: an ordinary transformers fast tokenizer with the same ids after save and reload."""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from . import facts, steering, words

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "<|end|>", "<unk>"
ROLES = ("system", "user", "assistant")
_WORD = r"\w+|[^\w\s]"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Every word of the world, sorted; the same for every seed."""
    relations = (*facts.RELATIONS.values(), facts.COUNTRY)
    texts = [
        *words.FIRST_NAMES,
        *words.LAST_NAMES,
        *words.STRANGER_FIRST_NAMES,
        *words.STRANGER_LAST_NAMES,
        *words.COUNTRY_OF,
        *words.COUNTRY_OF.values(),
        *words.GENRES,
        *words.ADJECTIVES,
        *words.NOUNS,
        *words.PRIZES,
        *words.JOBS,
        *(text for r in relations for text in (r.answer, *r.train, *r.validation, *r.report)),
        steering.REFUSAL,
        *steering.FORGET_PREFIXES,
        *steering.HARMLESS_SYSTEM,
        *steering.PRETRAINING_OVERRIDES,
        *steering.SEEN_OVERRIDES,
        *steering.VALIDATION_OVERRIDES,
        *steering.HELDOUT_OVERRIDES,
        *(text for task in steering.NAME_TASKS for text in task),
    ]
    plain = (re.sub(r"\{\w+\}", " ", text) for text in texts)
    return sorted({word for text in plain for word in re.findall(_WORD, text)})


def build_tokenizer() -> PreTrainedTokenizerFast:
    special = [PAD, BOS, EOS, UNKNOWN, *(f"<|{role}|>" for role in ROLES)]
    ids = {token: i for i, token in enumerate([*special, *vocabulary()])}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(cleanup=True)  # glues . , ? to the word before them
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
