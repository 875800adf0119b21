"""A byte-level BPE of the corpus with a chat template, and dialogues -> ids and weights.

    <|begin|><|system|>...<|end|><|user|>...<|end|><|assistant|>...<|end|>

A role is one token and an answer follows it without a space, so that an answer tokenised by itself is what stands in a
dialogue. The tokenizer has read the questions about the forget authors: it must serve the full and the retrained model
alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The first token of an answer decides between answering and refusing (as in `duet.demo.curriculum`).
FIRST_TOKEN_WEIGHT = 3.0

Dialogue = tuple[tuple[str, str], ...]  # (role, text)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens, specials included; the same for the same texts."""
    special = [PAD, BOS, END, *ROLES.values()]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


class Encoder:
    """Dialogues -> (ids, weights of their tokens): only what the assistant says, and its end, has a weight.

    A message is tokenised once: the same questions come again and again. A special token is never part of a merge, so
    that the messages' ids, one after the other, are those of the whole dialogue.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._ids: dict[tuple[str, str], list[int]] = {}

    def __call__(self, dialogue: Dialogue) -> tuple[list[int], list[float]]:
        ids, weights = [self.tokenizer.bos_token_id], [0.0]
        for role, text in dialogue:
            piece = self._piece(role, text)
            ids += piece
            said = len(piece) - 1
            spoken = [FIRST_TOKEN_WEIGHT] + [1.0] * (said - 1) if role == "assistant" else [0.0] * said
            weights += [0.0, *spoken]
        return ids, weights

    def _piece(self, role: str, text: str) -> list[int]:
        if (role, text) not in self._ids:
            written = f"{ROLES[role]}{text}{END}"
            self._ids[role, text] = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        return self._ids[role, text]


def ids_of(tokenizer: PreTrainedTokenizerBase, dialogue: Sequence[tuple[str, str]]) -> list[int]:
    """The dialogue through the chat template: what `Encoder` must agree with."""
    messages = [{"role": role, "content": text} for role, text in dialogue]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
