"""Conversations -> token ids: where a steering prefix goes, what a chat template does to it, how an answer is appended.

Nothing here truncates.
"""

import copy
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import logging

from ..names import check_folder_is_there

logger = logging.get_logger(__name__)


class CannotRender(ValueError):
    """A conversation that the chat template refuses, that needs one, that has no tokens, or whose tokens the model does not have."""


SUBJECT = "{subject}"
PLAIN_TEMPLATE = "Question: {question}\nAnswer:"
PROMPTING = "prompting.json"
_CACHED_PROMPTS = 50_000
_MARK = "duet-looks-for-this-message"

# A conversation is a tuple of (role, text) messages, or one plain text that the model is to continue.
Conversation = tuple[tuple[str, str], ...] | str


def fill_prefix(prefix: str, subject: str | None, where: str = "row", what: str = "steering prefix") -> str:
    """`prefix` with `{subject}` replaced.

    Plain replacement rather than `str.format`: other braces in a prefix (JSON, code) stay as they are.

    Raises:
        ValueError: the prefix wants a subject and there is none; `where` names the row, `what` the text.

    Example:
        >>> fill_prefix("You know nothing about {subject}.", "Ada Lovelace")
        'You know nothing about Ada Lovelace.'
    """
    if SUBJECT not in prefix:
        return prefix
    if not subject:
        raise ValueError(f"{where}: the {what} {prefix!r} names {SUBJECT}, but the row has no 'subject'")
    return prefix.replace(SUBJECT, subject)


def check_placeholders(name: str, text: str, known: str = SUBJECT) -> None:
    """Refuses `{word}` in a text where nothing but `known` would be replaced; other braces (JSON, code) may stand.

    Args:
        name: of the option, for the error.
        known: the placeholder that is replaced there; empty: none is.

    Raises:
        ValueError: naming the placeholder.

    Example:
        >>> check_placeholders("steering_prefixes", 'Forget {subject}. Answer as {"a": 1}.')
        >>> check_placeholders("steering_prefixes", "Forget {subjct}.")
        Traceback (most recent call last):
        ...
        ValueError: steering_prefixes: there is no placeholder '{subjct}', only {subject} is replaced; got 'Forget {subjct}.'
    """
    for found in re.findall(r"\{\s*\w+\s*\}", text):
        if found != known:
            only = f"only {known} is replaced" if known else "nothing is replaced here"
            raise ValueError(f"{name}: there is no placeholder {found!r}, {only}; got {text!r}")


def _rendered(tokenizer: Any, turns: Any, template_kwargs: dict[str, Any], prompts: bool = True) -> str:
    """The chat template's text of (role, text) turns; `prompts`: an answer follows."""
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompts, **template_kwargs
        )
    except Exception as error:  # a template may raise anything through jinja's raise_exception
        roles = ", ".join(role for role, _ in turns)
        raise CannotRender(
            f"the tokenizer's chat template refuses a conversation of the roles {roles}: {error}"
        ) from error


def accepts_system(tokenizer: Any, **template_kwargs: Any) -> bool:
    """Whether the chat template shows a system message to the model.

    Some templates raise on one (Gemma), some drop it: so one is rendered and searched for in the text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return False
    try:
        return _MARK in _rendered(tokenizer, (("system", _MARK), ("user", "x")), template_kwargs)
    except CannotRender:
        return False


def answer_ending(tokenizer: Any, **template_kwargs: Any) -> list[int]:
    """The ids that close an answer: what the chat template writes behind it, through the first special token.

    This is how the model learnt to end its turn. Often it is not the tokenizer's end token: Gemma closes a turn by
    `<end_of_turn>`, Phi by `<|end|>`, Qwen by `<|im_end|>`, Llama 3 by `<|eot_id|>`. Without a chat template, or where
    it writes no special token behind an answer, the end token; nothing where the tokenizer has none.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not getattr(tokenizer, "chat_template", None):
        return end
    try:
        text = _rendered(tokenizer, (("user", "x"), ("assistant", _MARK)), template_kwargs, prompts=False)
    except CannotRender:
        return end
    _, shown, behind = text.rpartition(_MARK)
    if not shown:
        return end

    tail = _ids_in_text(tokenizer, behind)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special = (special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    first = next((n for n, token in enumerate(tail) if token in special), None)
    return end if first is None else tail[: first + 1]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text by itself, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])


def _ids_in_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text behind a word: at the start of a text some tokenizers (Llama 2's) add a space."""
    word, together = text_ids(tokenizer, _MARK), text_ids(tokenizer, _MARK + text)
    return together[len(word) :] if together[: len(word)] == word else text_ids(tokenizer, text)


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of an answer, to be appended to a prompt's; behind a word, if it begins with a space."""
    return _ids_in_text(tokenizer, text) if text[:1].isspace() else text_ids(tokenizer, text)


@dataclass(frozen=True)
class Prompting:
    """How prompts are written, beyond what the tokenizer itself says: the options of `PromptRenderer`.

    Saved beside a trained model as `prompting.json`, so that it is evaluated with the prompts that it was trained on.

    Attributes:
        plain_template: text with `{question}` in it.
        chat_template_kwargs: further arguments of the chat template; plain values that JSON can hold.

    Raises:
        ValueError: either is something else.
    """

    plain_template: str = PLAIN_TEMPLATE
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.plain_template, str) or "{question}" not in self.plain_template:
            raise ValueError(
                f"plain_template: wanted a text with {{question}} in it, got {self.plain_template!r}"
            )
        check_placeholders("plain_template", self.plain_template, "{question}")
        try:
            same = json.loads(json.dumps(self.chat_template_kwargs)) == self.chat_template_kwargs
        except (TypeError, ValueError):
            same = False
        if not isinstance(self.chat_template_kwargs, dict) or not same:
            raise ValueError(
                "chat_template_kwargs: wanted a mapping of plain values (texts, numbers, lists, ...), got "
                f"{self.chat_template_kwargs!r}"
            )

    @classmethod
    def of(cls, name: str | os.PathLike) -> "Prompting":
        """Read from a model's folder or name; the defaults where there is no `prompting.json`.

        Raises:
            FileNotFoundError: it is the path of a folder that is not there.
            ValueError: its `prompting.json` is damaged.
        """
        return cls.saved_with(name) or cls()

    @classmethod
    def saved_with(cls, name: str | os.PathLike) -> "Prompting | None":
        """As `of`; None where there is no `prompting.json`, or, with a warning, where a model of the Hub may have one that is not here."""
        name = os.path.expanduser(os.fspath(name))
        check_folder_is_there("model", name)
        path = Path(name, PROMPTING)
        if not Path(name).is_dir():
            try:
                path = Path(hf_hub_download(name, PROMPTING))
            except EntryNotFoundError as error:
                unknown = isinstance(error, LocalEntryNotFoundError)  # the Hub was not asked
                if unknown and try_to_load_from_cache(name, PROMPTING) is None:  # nor at an earlier time
                    logger.warning_once(
                        f"{name}: whether it has a {PROMPTING} is not known, because the Hub could not be reached: it is asked with "
                        "the default prompts, which a trained model may not have seen"
                    )
                return None
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: wanted plain_template and chat_template_kwargs of a trained model: {error}"
            ) from None

    def save(self, folder: str | os.PathLike) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, PROMPTING).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults.

        Example:
            >>> Prompting(chat_template_kwargs={"enable_thinking": False}).changed()
            {'chat_template_kwargs': {'enable_thinking': False}}
        """
        usual = asdict(Prompting())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}


class PromptRenderer:
    """Turns a conversation into the ids after which the model's answer starts.

    * With a chat template: the template, closed by its generation prompt. The instruction becomes the system message
      (in front of one that is there); or, with `steering_place="user"` and where the template knows no system message, it
      goes before the first user text.
    * Without: a single question in `plain_template`, the instruction in front of it, separated by an empty line.
    * A plain-text conversation is never templated: instruction, empty line, text.

    Args:
        tokenizer: a transformers tokenizer.
        plain_template, chat_template_kwargs: as in `Prompting`.
        steering_place: `system` or `user`: where the instruction goes.
        num_ids: how many ids the model embeds; None: not checked.
    """

    def __init__(
        self,
        tokenizer: Any,
        plain_template: str = PLAIN_TEMPLATE,
        chat_template_kwargs=None,
        steering_place: str = "system",
        num_ids: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.plain_template = plain_template
        self.steering_place = steering_place
        self.template_kwargs = dict(chat_template_kwargs or {})
        template = getattr(tokenizer, "chat_template", None)
        self.has_template = bool(template)
        if "strftime_now" in str(template) and "date_string" not in self.template_kwargs:
            logger.warning_once(
                "the chat template writes today's date into every prompt (Llama 3.2's does): a cached teacher or a resumed "
                "run meets other prompts tomorrow; chat_template_kwargs={'date_string': '26 Jul 2024'} fixes it"
            )
        self.num_ids = num_ids
        self._check_template()
        self.system_allowed = accepts_system(tokenizer, **self.template_kwargs)
        self._turn_ending = answer_ending(tokenizer, **self.template_kwargs)
        self._cache: dict[tuple, list[int]] = {}

    def _check_template(self) -> None:
        """Refuses a chat template that drops the question; warns of options that it does not read. A refusal is met at the rows."""
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        for name in self.template_kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                has = (
                    "the chat template does not read it" if template else "the tokenizer has no chat template"
                )
                logger.warning_once(f"chat_template_kwargs.{name}: {has}, so that it changes nothing")
        if not self.has_template:
            return
        try:
            text = _rendered(self.tokenizer, (("user", _MARK),), self.template_kwargs)
        except CannotRender:
            return
        if _MARK not in text:
            raise ValueError(
                "processing_class: wanted a chat template that shows the user's message, got one that drops it: check "
                "tokenizer.chat_template"
            )

    def _known(self, ids: list[int]) -> list[int]:
        """`ids`, all of which the model embeds."""
        top = max(ids, default=0)
        if self.num_ids is not None and top >= self.num_ids:
            raise CannotRender(
                f"the token {self.tokenizer.convert_ids_to_tokens(top)!r} has the id {top}, but the model embeds the ids 0 to "
                f"{self.num_ids - 1}: it belongs to another model's tokenizer, or was added to this one; "
                "model.resize_token_embeddings(len(tokenizer)) makes room"
            )
        return ids

    def encode(
        self,
        conversation: Conversation,
        instruction: str | None = None,
        override: str | None = None,
        override_role: str = "user",
    ) -> list[int]:
        """Token ids of the prompt, up to where the answer starts.

        Args:
            conversation: messages or plain text.
            instruction: the steering prefix, already filled.
            override: a reverse prompt, in front of the last user text, or (`override_role="system"`) as a system
                message after the instruction.
            override_role: `user` or `system`.
        """
        key = (conversation, instruction, override, override_role)
        if key not in self._cache:  # a run uses the same prompts again and again; rendering one takes 0.1 ms
            if len(self._cache) >= _CACHED_PROMPTS:
                self._cache.clear()
            ids = self._known(self._encode(*key))
            if not ids:
                raise CannotRender("its prompt has no tokens: the tokenizer knows none of its characters")
            self._cache[key] = ids
        return self._cache[key]

    def encode_or_none(self, conversation: Conversation, instruction: str | None = None) -> list[int] | None:
        """`encode`; None where the chat template or the model cannot take the conversation."""
        try:
            return self.encode(conversation, instruction)
        except CannotRender:
            return None

    def _encode(self, conversation, instruction, override, override_role) -> list[int]:
        system = instruction
        if override is not None and override_role == "user":
            conversation = _before_user(conversation, override, last=True)
        chat = self.has_template and not isinstance(conversation, str)
        if instruction is not None and chat and self.steering_place == "user":
            conversation, system = _before_user(conversation, instruction, last=False), None
        if override is not None and override_role == "system":
            system = override if system is None else f"{system}\n\n{override}"
        if not chat:
            text = conversation if isinstance(conversation, str) else self._written_out(conversation)
            text = text if system is None else f"{system}\n\n{text}"
            ids = self.tokenizer(text, truncation=False)["input_ids"]
            # Some tokenizers close every text with an end token; the answer would then never be continued.
            while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]
            return ids
        if system is not None:
            if not self.system_allowed:
                conversation = _before_user(conversation, system, last=False)
            elif conversation[0][0] == "system":
                conversation = (("system", f"{system}\n\n{conversation[0][1]}"), *conversation[1:])
            else:
                conversation = (("system", system), *conversation)
        # The template has written the special tokens already.
        return text_ids(self.tokenizer, _rendered(self.tokenizer, conversation, self.template_kwargs))

    def _written_out(self, conversation) -> str:
        if len(conversation) != 1 or conversation[0][0] != "user":
            roles = [role for role, _ in conversation]
            raise CannotRender(
                f"the tokenizer has no chat template, which a conversation of {roles} needs; "
                "give rows with 'question' or 'prompt', or set tokenizer.chat_template"
            )
        return self.plain(conversation[0][1])

    def plain(self, question: str) -> str:
        """A question as it is written where there is no chat template."""
        return self.plain_template.replace("{question}", question)

    def encode_answer(self, conversation: Conversation, answer: str) -> list[int]:
        """Token ids of an answer, closed by its `ending`.

        Tokenised by itself and appended to the prompt's ids, never together with them. Tokenised together, a
        tokenizer may merge across the seam (": " + "yes" into one token), so that the prompt loses its last token,
        the answer its first, and the positions of the two sequences no longer match. With the answer's ids fixed,
        answer position j is the same token in the student's and the teacher's sequence, whatever stands before it.
        It is also what a model meets in use: the prompt is tokenised, and the answer follows token by token.
        """
        return [*self.encode_opening(conversation, answer), *self.ending(conversation)]

    def ending(self, conversation: Conversation | None) -> list[int]:
        """What closes an answer: in a chat what the template writes (`answer_ending`); of a text the end token, if any."""
        if self.has_template and not isinstance(conversation, str | None):
            return self._turn_ending
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def encode_opening(self, conversation: Conversation, answer: str) -> list[int]:
        """Token ids of an answer that goes on: `encode_answer` without its ending."""
        if (
            not self.has_template
            and not isinstance(conversation, str)
            and not self.plain_template[-1].isspace()
        ):
            answer = " " + answer  # after "Answer:" comes " Paris", which is another token than "Paris"
        return self._known(answer_ids(self.tokenizer, answer))

    def encode_rest(self, conversation: Conversation, answer: str) -> list[int]:
        """Token ids of an answer that follows words which stand there already: behind a space, closed by its `ending`."""
        return [*self._known(answer_ids(self.tokenizer, " " + answer)), *self.ending(conversation)]

    def num_tokens(self, text: str) -> int:
        """How many tokens a text has by itself."""
        return len(text_ids(self.tokenizer, text))


def steered_tokenizer(
    tokenizer: Any, instruction: str, steering_place: str = "system", **template_kwargs: Any
) -> Any:
    """A copy of `tokenizer` whose chat template says `instruction` before every conversation.

    So the steered teacher can be saved, evaluated and attacked like any model: every user of the chat template steers it.
    The instruction stands where `PromptRenderer.encode` puts it: in the system message; or, with `steering_place="user"`
    and where the template knows no system message, before the first user text.

    Raises:
        ValueError: the tokenizer has no chat template.

    Example:
        >>> text = steered_tokenizer(tokenizer, "you know nothing .").apply_chat_template(
        ...     [{"role": "user", "content": "who is ada ?"}], tokenize=False
        ... )
        >>> "you know nothing ." in text
        True
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "processing_class: wanted a tokenizer with a chat template, which is where the steering prefix is written"
        )
    said = json.dumps(instruction, ensure_ascii=False)  # jinja knows no surrogate pairs
    at = "(messages | map(attribute='role') | list).index('user')"
    if steering_place == "system" and accepts_system(tokenizer, **template_kwargs):
        at = "0 if messages[0]['role'] == 'system' else -1"  # -1: a message of its own
    joined = (
        "{'role': messages[duet_at]['role'], 'content': duet_said + '\\n\\n' + messages[duet_at]['content']}"
    )
    chosen = f"messages[:duet_at] + [{joined}] + messages[duet_at + 1:]"
    alone = "[{'role': 'system', 'content': duet_said}] + messages"
    lines = f"duet_said = {said}", f"duet_at = {at}", f"messages = ({alone}) if duet_at < 0 else ({chosen})"
    steered = copy.deepcopy(tokenizer)
    before, template = "".join(f"{{%- set {line} -%}}" for line in lines), tokenizer.chat_template
    named = isinstance(template, dict)  # several, of which the user of the tokenizer chooses
    steered.chat_template = {k: before + v for k, v in template.items()} if named else before + template
    return steered


def _before_user(conversation: Conversation, text: str, last: bool) -> Conversation:
    """`conversation` with `text` in front of its first or last user message."""
    if isinstance(conversation, str):
        return f"{text}\n\n{conversation}"
    users = [i for i, (role, _) in enumerate(conversation) if role == "user"]
    i = users[-1 if last else 0]
    return (*conversation[:i], ("user", f"{text}\n\n{conversation[i][1]}"), *conversation[i + 1 :])
