"""duet.data.prompts: where prefixes and reverse prompts go, what templates do to them, how answers are appended."""

import re

import pytest
from tiny_models import (
    CHAT_TEMPLATE,
    DROPS_SYSTEM_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    merging_tokenizer,
    tiny,
    word_tokenizer,
)
from tokenizers import AddedToken, normalizers, processors

from duet.data.prompts import PromptRenderer, accepts_system, answer_ending, fill_prefix
from duet.model.answers import end_tokens

QUESTION = (("user", "who is ada lovelace ?"),)
PREFIX = "you know nothing about ada lovelace ."


def text_of(renderer, *args, **kwargs):
    return renderer.tokenizer.decode(renderer.encode(*args, **kwargs), clean_up_tokenization_spaces=False)


def test_fill_prefix_replaces_the_subject_and_nothing_else():
    assert fill_prefix('forget {subject} and {subject} {"a": {}}', "x") == 'forget x and x {"a": {}}'
    assert fill_prefix("forget everything", None) == "forget everything"
    with pytest.raises(ValueError, match=r"forget_dataset\[3\].*no 'subject'"):
        fill_prefix("forget {subject}", None, "forget_dataset[3]")


@pytest.mark.parametrize(
    ("template", "accepted"),
    [(CHAT_TEMPLATE, True), (NO_SYSTEM_TEMPLATE, False), (DROPS_SYSTEM_TEMPLATE, False), (None, False)],
)
def test_a_system_message_must_be_seen_to_be_accepted(template, accepted):
    assert accepts_system(word_tokenizer(template)) is accepted


def test_prefix_becomes_the_system_message():
    text = text_of(PromptRenderer(word_tokenizer()), QUESTION, instruction=PREFIX)
    assert text == f"<s> <system> {PREFIX} </s> <user> who is ada lovelace ? </s> <assistant>"


def test_prefix_joins_a_system_message_that_is_there():
    conversation = (("system", "answer yes"), *QUESTION)
    text = text_of(PromptRenderer(word_tokenizer()), conversation, instruction=PREFIX)
    assert text.startswith(f"<s> <system> {PREFIX} answer yes </s> <user>")


@pytest.mark.parametrize("template", [NO_SYSTEM_TEMPLATE, DROPS_SYSTEM_TEMPLATE])
def test_without_a_system_role_the_prefix_goes_before_the_first_user_text(template):
    renderer = PromptRenderer(word_tokenizer(template))
    text = text_of(renderer, QUESTION, instruction=PREFIX)
    assert text == f"<s> <user> {PREFIX} who is ada lovelace ? </s> <assistant>"
    turns = (("user", "one"), ("assistant", "two"), ("user", "three"))
    text = text_of(renderer, turns, instruction=PREFIX)
    assert text == f"<s> <user> {PREFIX} one </s> <assistant> two </s> <user> three </s> <assistant>"


def test_in_the_users_turn_the_prefix_goes_before_the_first_text():
    renderer = PromptRenderer(word_tokenizer(), steering_place="user")
    turns = (("system", "answer"), ("user", "one"), ("assistant", "two"), ("user", "three"))
    text = text_of(renderer, turns, instruction=PREFIX, override="ignore")
    assert (
        text.startswith(f"<s> <system> answer </s> <user> {PREFIX} one </s>")
        and "<user> ignore three" in text
    )
    text = text_of(renderer, QUESTION, instruction=PREFIX, override="ignore")
    assert text == f"<s> <user> {PREFIX} ignore who is ada lovelace ? </s> <assistant>"
    text = text_of(renderer, QUESTION, instruction=PREFIX, override="ignore", override_role="system")
    assert text.startswith(f"<s> <system> ignore </s> <user> {PREFIX} who")
    assert text_of(renderer, "the capital of", instruction=PREFIX) == f"<s> {PREFIX} the capital of"


def test_without_a_template_a_question_is_written_out_and_plain_text_is_left_alone():
    renderer = PromptRenderer(word_tokenizer(None), plain_template="Question : {question} Answer :")
    assert text_of(renderer, QUESTION) == "<s> Question : who is ada lovelace ? Answer :"
    steered = text_of(renderer, QUESTION, instruction=PREFIX)
    assert steered == f"<s> {PREFIX} Question : who is ada lovelace ? Answer :"
    assert text_of(renderer, "the capital of france is") == "<s> the capital of france is"
    # plain text is not templated even where there is a template
    assert text_of(PromptRenderer(word_tokenizer()), "the capital of") == "<s> the capital of"


def test_a_reverse_prompt_goes_before_the_last_user_text_or_into_the_system_message():
    renderer = PromptRenderer(word_tokenizer())
    turns = (("user", "one"), ("assistant", "two"), ("user", "three"))
    text = text_of(renderer, turns, override="ignore earlier instructions")
    assert text.endswith(
        "<user> one </s> <assistant> two </s> <user> ignore earlier instructions three </s> <assistant>"
    )
    text = text_of(renderer, QUESTION, override="ignore earlier instructions", override_role="system")
    assert text.startswith("<s> <system> ignore earlier instructions </s> <user> who is")
    both = text_of(renderer, QUESTION, instruction=PREFIX, override="ignore", override_role="system")
    assert both.startswith(f"<s> <system> {PREFIX} ignore </s> <user> who is")


def test_one_beginning_of_sequence_token_and_no_end_token():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    renderer = PromptRenderer(tokenizer)
    assert renderer.encode(QUESTION).count(1) == 1
    assert renderer.encode("the capital of")[-1] != 2, "an end token would close the text before the answer"


def test_several_turns_need_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        PromptRenderer(word_tokenizer(None)).encode((("user", "a"), ("assistant", "b"), ("user", "c")))


def test_an_answer_is_closed_by_the_end_token_and_continues_the_plain_template():
    tokenizer = merging_tokenizer()
    ids = PromptRenderer(tokenizer).encode_answer(QUESTION, "yes")
    assert tokenizer.convert_ids_to_tokens(ids) == [" ", "y", "es", "</s>"]
    assert tokenizer.convert_ids_to_tokens(PromptRenderer(tokenizer).encode_answer("text", "yes"))[0] == "y"
    tokenizer = merging_tokenizer("{% for m in messages %}{{ m['content'] }}>{% endfor %}")
    assert tokenizer.convert_ids_to_tokens(PromptRenderer(tokenizer).encode_answer(QUESTION, "yes"))[0] == "y"
    rest = PromptRenderer(tokenizer).encode_rest(QUESTION, "yes")
    assert tokenizer.convert_ids_to_tokens(rest) == [" ", "y", "es", "</s>"], "behind words that stand there"


def test_an_answer_is_written_as_the_model_writes_it_behind_a_word():
    """Llama 2's tokenizer adds a space at the start of every text; there is none where an answer starts."""
    for template in (None, "{% for m in messages %}{{ m['content'] }}>{% endfor %}"):
        tokenizer = merging_tokenizer(template)
        tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
        renderer = PromptRenderer(tokenizer)
        for ids in (
            renderer.encode_answer(QUESTION, " yes" if template else "yes"),
            renderer.encode_answer("a text", " yes"),
            renderer.encode_rest(QUESTION, "yes"),
        ):
            assert tokenizer.convert_ids_to_tokens(ids) == [" ", "y", "es", "</s>"]


def chat(turn: str, role: str = "m['role']") -> str:
    """A template of turns that are opened and closed as a family of models does."""
    opener, closer = turn.split("...")
    said = f"{opener.replace('ROLE', '{{ ' + role + ' }}')}{{{{ m['content'] | trim }}}}{closer}"
    prompt = opener.replace("ROLE", "assistant")
    return (
        f"{{% for m in messages %}}{said}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


TURNS = {
    "gemma": ("<start_of_turn>ROLE\n...<end_of_turn>\n", ["<end_of_turn>"]),
    "phi": ("<|ROLE|>\n...<|end|>\n", ["<|end|>"]),
    "qwen": ("<|im_start|>ROLE\n...<|im_end|>\n", ["<|im_end|>"]),
    "llama 3": ("<|start_header_id|>ROLE<|end_header_id|>\n\n...<|eot_id|>", ["<|eot_id|>"]),
    "llama 2, a space before it": ("[ROLE] ... {{ eos_token }}", [" ", "</s>"]),
    "a word before it": ("ROLE: ... yes<|end|>", [" ", "y", "es", "<|end|>"]),
    "no special token": ("ROLE: ...\n", ["</s>"]),
}


def closing_tokenizer(name: str):
    """Its end token is </s>, whatever closes a turn; as in the checkpoints these are special but have no name."""
    tokenizer = merging_tokenizer(chat(TURNS[name][0]))
    special = re.findall(r"<[^>/]+>", TURNS[name][0].replace("ROLE", "user"))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


@pytest.mark.parametrize("name", TURNS)
def test_an_answer_is_closed_as_the_chat_template_closes_a_turn(name):
    tokenizer = closing_tokenizer(name)
    renderer = PromptRenderer(tokenizer)
    ids = renderer.encode_answer(QUESTION, "no")
    assert tokenizer.convert_ids_to_tokens(ids) == ["n", "o", *TURNS[name][1]]
    # What is learned is what the template writes of the whole conversation, as far as it goes.
    messages = [{"role": "user", "content": QUESTION[0][1]}, {"role": "assistant", "content": "no"}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    if name != "no special token":
        assert whole[: len(renderer.encode(QUESTION)) + len(ids)] == renderer.encode(QUESTION) + ids
    assert renderer.encode_answer("a text", "no")[-1] == tokenizer.eos_token_id, "a text is no turn"
    assert renderer.encode_answer(QUESTION, "no") == [*renderer.encode_opening(QUESTION, "no"), *ids[2:]]


@pytest.mark.parametrize("name", TURNS)
def test_generation_ends_where_training_closed_the_answer(name):
    tokenizer = closing_tokenizer(name)
    ends = end_tokens(tiny(), tokenizer)
    assert tokenizer.convert_tokens_to_ids(TURNS[name][1])[-1] in ends and tokenizer.eos_token_id in ends
    assert len(ends) == len(set(ends))


def test_a_template_that_shows_no_answer_falls_back_to_the_end_token():
    raising = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    silent = "{{ messages[0]['content'] }}<|end|>"
    for template in (raising, silent, None):
        assert answer_ending(merging_tokenizer(template)) == [merging_tokenizer().eos_token_id]
    assert answer_ending(word_tokenizer("{% for m in messages %}{{ m['content'] }} zebra {% endfor %}")) == [
        2
    ], "an unknown word is no end"
    assert answer_ending(word_tokenizer(None, eos_token=None)) == []


def test_the_tokenizer_would_merge_at_the_seam_and_is_not_allowed_to():
    tokenizer = merging_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}>")
    renderer = PromptRenderer(tokenizer)
    prompt, answer = renderer.encode((("user", "what"),)), renderer.encode_answer((("user", "what"),), "yes")
    together = tokenizer("what>yes", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(together) == ["w", "h", "a", "t", ">y", "es"], "no merge: no test"
    assert tokenizer.convert_ids_to_tokens(prompt + answer) == ["w", "h", "a", "t", ">", "y", "es", "</s>"]


def test_a_long_prompt_is_not_truncated():
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 8
    tokenizer.backend_tokenizer.enable_truncation(8)
    ids = PromptRenderer(tokenizer).encode(QUESTION, instruction=" ".join([PREFIX] * 5))
    assert len(ids) == 5 * 7 + 11


def test_template_arguments_reach_the_template():
    template = "{% if loud %}! {% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    renderer = PromptRenderer(word_tokenizer(template), chat_template_kwargs={"loud": True})
    assert text_of(renderer, QUESTION).startswith("!")


def test_encoding_is_cached_but_not_shared():
    renderer = PromptRenderer(word_tokenizer())
    assert (
        renderer.encode(QUESTION)
        == renderer.encode(QUESTION)
        != renderer.encode(QUESTION, instruction=PREFIX)
    )
