"""A row of a task -> token ids of the prompt and of what is scored; or the reason why the row cannot be asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ...data.prompts import CannotRender, Conversation, Prompting, PromptRenderer, answer_ids, fill_prefix
from ...data.rows import LETTERS, PROMPTS, checked_text, correct_choice, read_row, text_of
from ..elicit import ELICITED, ELICITED_NOTE
from ..intervals import fact_of
from ..scoring import Forced
from ..values import Value, listed, spellings, value_of
from .suite import Task, fill


class _Written(str):
    """A question as the plain template writes it; other texts are continued as they stand."""


class CannotAsk(Exception):
    """A row that is left out: `status` says why in a word, the message in a sentence."""

    def __init__(self, status: str, why: str):
        super().__init__(why)
        self.status = status


@dataclass
class Item:
    """One row, ready.

    Attributes:
        prompt: ids before the answer.
        shown: fields of the row's record (question, answer, value, note).
        reference: for `generate`.
        value: for `generate`: the part of the reference that counts, where the row has a column `value`.
        texts: for `score` and `multiple_choice`: name -> sequences.
        lists: names of the texts whose column held a list.
        correct: for `multiple_choice`.
    """

    id: int
    prompt: list[int]
    shown: dict[str, Any]
    reference: str = ""
    value: Value | None = None
    texts: dict[str, list[Forced]] = field(default_factory=dict)
    lists: frozenset[str] = frozenset()
    correct: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        forced = [len(f.prompt) + len(f.answer) for sequences in self.texts.values() for f in sequences]
        return max(forced, default=len(self.prompt))

    @property
    def sequences(self) -> int:
        return sum(map(len, self.texts.values())) or 1


class Asker:
    """Makes the items of one task.

    Args:
        shots: rows of the worked examples.
        context: how many tokens the model can read, or None.
        prompting: how prompts are written for the model; a task's own `plain` comes first.
        steering: a prefix before every question, as for the steered teacher.
        subjects: replace `{subject}` in it, in turn; none: the row's own subject does.
        num_ids: how many ids the model embeds, or None.
        place: `system` or `user`: where the prefix goes, and with it a system message of the task.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: Task,
        shots: Sequence[Mapping[str, Any]] = (),
        context: int | None = None,
        prompting: Prompting | None = None,
        steering: str | None = None,
        subjects: Sequence[str] = (),
        num_ids: int | None = None,
        place: str = "system",
    ):
        prompting, self.steering, self.subjects = prompting or Prompting(), steering, tuple(subjects)
        self.tokenizer, self.task, self.context = tokenizer, task, context
        self.plain = task.plain or prompting.plain_template
        self.renderer = PromptRenderer(tokenizer, self.plain, prompting.chat_template_kwargs, place, num_ids)
        self.chat = task.chat == "auto" and self.renderer.has_template
        if task.few_shot and len(shots) < task.few_shot.count:
            raise ValueError(
                f"{task.name}.few_shot.count: wanted {task.few_shot.count} worked examples, {task.few_shot.data} has "
                f"{len(shots)}"
            )
        self.shots = list(shots[: task.few_shot.count]) if task.few_shot else []

    def item(self, index: int, row: Mapping[str, Any]) -> Item:
        """Row `index` of the task.

        Raises:
            CannotAsk: `bad_row`, `no_tokens`, `unknown_tokens` (the tokenizer has no token for a part of the answer)
                or `too_long`.
        """
        where = f"{self.task.name}, row {index}"
        try:
            row, given = self._read(row, where)
            question = None if self.task.question is None else self._question(row, where)
            conversation = None if question is None else self._conversation(question, given)
            make = {"generate": self._generate, "score": self._score, "multiple_choice": self._choice}
            item = make[self.task.kind](index, row, conversation, where)
            item.shown = ({} if question is None else {"question": question}) | item.shown
            answer = row.get(self.task.answer)
            if self.task.kind != "multiple_choice" and isinstance(answer, str):
                for name in ("subject", "value", self.task.answer):  # of which the fact is made
                    if isinstance(text := row.get(name), str) and text.strip():
                        checked_text(text, f"{where}, {name}")
                subject, value = row.get("subject"), item.value or row.get("value")
                subject = subject if isinstance(subject, str) else None
                value = value if isinstance(value, (str, tuple)) else None
                item.shown["fact"] = fact_of(question or "", answer, subject, value)
        except CannotRender as error:
            raise CannotAsk("refused_by_template", f"{where}: {error}") from None
        except (ValueError, TypeError) as error:
            raise CannotAsk("bad_row", str(error)) from None
        # An answer needs room for at least one token; the last token of a given text is predicted, not read.
        needed = item.length + 1 if self.task.kind == "generate" else item.length - 1
        if self.context is not None and needed > self.context:
            raise CannotAsk("too_long", f"{where}: wants {needed} tokens, the model can read {self.context}")
        return item

    # --- prompts -----------------------------------------------------------------------------------------------

    def _prompt(
        self, index: int, conversation: Conversation, row: Mapping[str, Any], where: str
    ) -> list[int]:
        subject = self.subjects[index % len(self.subjects)] if self.subjects else row.get("subject")
        steering = None if self.steering is None else fill_prefix(self.steering, subject, where)
        return self.renderer.encode(
            conversation, "\n\n".join(filter(None, (steering, self.task.system))) or None
        )

    def _question(self, row: Mapping[str, Any], where: str) -> str:
        question = fill(self.task.question or "", row, where)
        if self.task.kind == "multiple_choice" and self.task.letters:
            shown = zip(LETTERS, self._choices(row, where), strict=False)
            question += "".join(f"\n{letter}. {choice}" for letter, choice in shown)
        return question

    def _read(self, row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], Conversation]:
        """A row of `messages` or `prompt`, or with a `completion`, as one with `question` and `answer`; and its conversation, or ()."""
        read = self.task.columns()
        given = [name for name in PROMPTS if row.get(name) is not None]
        if "question" in read and given and "question" not in given:
            query = read_row(row, where)
            text = query.conversation if isinstance(query.conversation, str) else query.conversation[-1][1]
            return {**row, "question": text, "answer": query.answer}, query.conversation
        if "answer" in read and row.get("answer") is None and row.get("completion") is not None:
            row = {**row, "answer": row["completion"]}
        return row, ()

    def _conversation(self, question: str, given: Conversation = ()) -> Conversation:
        """`question` as the model is asked it: in the place of the last message of `given`, or of the text that it is."""
        if isinstance(given, str) or len(given) > 1:
            if self.shots or (self.task.chat == "never" and not isinstance(given, str)):
                raise ValueError(
                    f"{self.task.name}: with few_shot, and with chat: never, wanted rows with one 'question', got a text or a chat"
                )
            return question if isinstance(given, str) else (*given[:-1], ("user", question))
        worked = []
        for i, shot in enumerate(self.shots):
            where = f"{self.task.name}.few_shot, row {i}"
            worked.append((self._question(shot, where), self._reference(shot, where)))
        if self.chat:
            turns = [(("user", asked), ("assistant", answer)) for asked, answer in worked]
            return (*chain.from_iterable(turns), ("user", question))
        texts = [
            self.renderer.plain(asked) + self._answer_text(_Written(), answer) for asked, answer in worked
        ]
        between = self.task.few_shot.separator if self.task.few_shot else ""
        return _Written(between.join([*texts, self.renderer.plain(question)]))

    def _answer_text(self, conversation: Conversation | None, text: str) -> str:
        """ "Answer:" is continued by " Paris", which is another token than "Paris"; a running text as it stands."""
        written = isinstance(conversation, _Written) and not self.plain.endswith("{question}")
        return f" {text}" if written and not self.plain[-1].isspace() else text

    def _reference(self, row: Mapping[str, Any], where: str) -> str:
        if self.task.kind == "multiple_choice":
            choices = self._choices(row, where)
            correct = self._correct(row, choices, where)
            return LETTERS[correct] if self.task.letters else choices[correct]
        return text_of(row.get(self.task.answer), f"{where}, {self.task.answer}")

    # --- kinds -------------------------------------------------------------------------------------------------

    def _generate(self, index: int, row: Mapping[str, Any], conversation: Conversation, where: str) -> Item:
        reference = self._reference(row, where)
        prompt = self._prompt(index, conversation, row, where)
        shown: dict[str, Any] = {"answer": reference}
        if row.get(ELICITED):
            shown["note"] = ELICITED_NOTE
        try:
            value = value_of(row, reference, where)
        except ValueError as error:
            if not row.get(ELICITED):
                raise
            value, shown["note"] = None, f"{error}; it was not used"
        if value is not None:
            shown["value"] = value
        # An answer that the tokenizer cannot represent would look forgotten; one spelling that it can is enough.
        wanted = spellings(reference if value is None else value)
        ids = [answer_ids(self.tokenizer, self._answer_text(conversation, text)) for text in wanted]
        best = min(ids, key=lambda each: self.tokenizer.unk_token_id in each)
        self._check_known(best, wanted[0], where)
        return Item(index, prompt, shown, reference, value)

    def _score(
        self, index: int, row: Mapping[str, Any], conversation: Conversation | None, where: str
    ) -> Item:
        prompt = [] if conversation is None else self._prompt(index, conversation, row, where)
        texts: dict[str, list[Forced]] = {}
        lists = set()
        for name, columns in self.task.texts.items():
            column = next((c for c in columns if row.get(c) is not None), None)
            if column is None:
                raise ValueError(f"{where}: wanted {' or '.join(columns)}, got {', '.join(sorted(row))}")
            values = row[column]
            if column != self.task.answer:
                values = listed(values, f"{where}, {column}")
            if isinstance(values, (list, tuple)):
                lists.add(name)
            else:
                values = [values]
            if not values or (name == "answer" and name in lists):
                raise ValueError(
                    f"{where}, {column}: wanted {'one text' if values else 'a text'}, got {values!r:.60}"
                )
            texts[name] = [
                self._forced(prompt, conversation, text_of(value, f"{where}, {column}"), where)
                for value in values
            ]
        return Item(index, prompt, {}, texts=texts, lists=frozenset(lists))

    def _choice(self, index: int, row: Mapping[str, Any], conversation: Conversation, where: str) -> Item:
        choices = self._choices(row, where)
        correct = self._correct(row, choices, where)
        prompt = self._prompt(index, conversation, row, where)
        scored = LETTERS[: len(choices)] if self.task.letters else choices
        forced = [self._forced(prompt, conversation, text, where) for text in scored]
        shown = {"choices": choices, "correct": correct}
        return Item(index, prompt, shown, texts={"choices": forced}, correct=correct)

    def _choices(self, row: Mapping[str, Any], where: str) -> list[str]:
        choices = listed(row.get(self.task.choices), f"{where}, {self.task.choices}")
        if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(
                f"{where}, {self.task.choices}: wanted a list of 2 to {len(LETTERS)} choices, got {choices!r:.60}"
            )
        return [text_of(choice, f"{where}, {self.task.choices}") for choice in choices]

    def _correct(self, row: Mapping[str, Any], choices: Sequence[str], where: str) -> int:
        """The index of the correct choice, given as an index, a letter or the choice itself."""
        return correct_choice(row.get(self.task.answer), choices, f"{where}, {self.task.answer}")

    def _check_known(self, ids: Sequence[int], text: str, where: str) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            raise CannotAsk("unknown_tokens", f"{where}: the tokenizer cannot represent {text!r:.60}")

    def _forced(self, prompt: list[int], conversation: Conversation | None, text: str, where: str) -> Forced:
        text = self._answer_text(conversation, text)
        most = self.task.max_tokens
        if conversation is None:
            ids = self.tokenizer(text, truncation=False)["input_ids"]
            # Without a prompt nothing predicts the first token: it is only read.
            prompt, ids, most = ids[:1], ids[1:], most and most - 1
        else:
            ids = answer_ids(self.tokenizer, text)
        answer = ids[:most]
        if not answer:
            raise CannotAsk("no_tokens", f"{where}: {text!r:.60} has no tokens to score")
        self._check_known(answer, text, where)
        if self.task.end_token and self.task.kind == "score":
            answer = [*ids, *self.renderer.ending(conversation)][:most]
        return Forced(list(prompt), list(answer))
