"""Targets of duet_deep: names exchanged, distributions averaged, and what of an answer counts as knowledge."""

import math
from types import SimpleNamespace

import pytest
import torch
from learned_models import knowing
from tiny_models import forget_rows, quick, retain_rows, word_tokenizer

from duet import DuetConfig, DuetTrainer
from duet.data.dataset import Draw, UnlearnDataset
from duet.data.prompts import PromptRenderer
from duet.data.rows import read_rows
from duet.methods.counterfactual import _ForgetRow, certain, log_probability, mixture_topk, stranger
from duet_kernels import LMHead, TopK, topk_distill_loss

NAMES = ["red river", "blue animal", "green color"]


def ids(text):
    return word_tokenizer()(text, add_special_tokens=False)["input_ids"]


def words(tokens):
    return word_tokenizer().convert_ids_to_tokens(tokens)


# -- names -----------------------------------------------------------------------------------------------------------


def test_a_name_is_replaced_and_its_tokens_change_places():
    found = stranger(word_tokenizer(), [1], ids("yes ada lovelace wrote code"), "ada lovelace", "red river")
    assert words(found.answer) == ["yes", "red", "river", "wrote", "code"]
    assert found.places == [0, 1, 2, 3, 4]
    ada, lovelace, red, river = ids("ada lovelace red river")
    assert found.swaps == {ada: red, red: ada, lovelace: river, river: lovelace}


@pytest.mark.parametrize(
    ("new", "answer", "places"),
    [("red", "yes red wrote", [0, 1, 1, 2]), ("red blue river", "yes red blue river wrote", [0, 1, 2, 4])],
)
def test_names_of_other_lengths_line_up_behind_the_name(new, answer, places):
    found = stranger(word_tokenizer(), [1], ids("yes ada lovelace wrote"), "ada lovelace", new)
    assert words(found.answer) == answer.split() and found.places == places


def test_an_id_changes_places_once():
    swaps = stranger(word_tokenizer(), [1], ids("yes"), "ada lovelace", "red red").swaps
    assert swaps and all(swaps[new] == old for old, new in swaps.items())


def test_names_are_drawn_from_the_seed_and_never_the_subject():
    many = ["red river", "blue animal", "green color", "one two", "ada lovelace"]
    [row, *_] = read_rows(forget_rows(1, answers=False), "forget_dataset")

    def drawn(count, seed=0):
        options = {"counterfactual_names": many, "num_counterfactuals": count, "seed": seed}
        args = DuetConfig(output_dir="unused", objective="duet_deep", **options)
        return _ForgetRow(SimpleNamespace(args=args), row, 0).names

    pairs = [drawn(2, seed) for seed in range(6)]
    assert all(len(names) == 2 for names in pairs) and len(set(map(tuple, pairs))) > 1
    assert row.subject == "ada lovelace" and sorted(drawn(9)) == sorted(many[:-1])


def test_an_answer_without_the_name_stays():
    answer = ids("the code machine of the war .")
    found = stranger(word_tokenizer(), [1], answer, "alan turing", "red river")
    assert found.answer == answer and found.places == list(range(7))


# -- mixtures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 11])
def test_the_mixture_is_the_mean_of_swapped_distributions(k):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((4, 5, 6), (11, 6)))
    swaps = [{}, {0: 7, 7: 0}, {0: 3, 3: 0, 1: 2, 2: 1}, {10: 0, 0: 10}]
    labels = torch.tensor([4, 9, 0, 1, 10])
    found = mixture_topk(hidden, LMHead(weight), swaps, labels, k)

    p = (hidden @ weight.T).softmax(-1)
    for m, swap in enumerate(swaps):
        order = [swap.get(v, v) for v in range(11)]
        p[m] = p[m][:, order]
    p = p.mean(0)
    torch.testing.assert_close(found.values.exp(), p.gather(-1, found.indices), rtol=1e-9, atol=1e-12)
    rest = (1 - p.gather(-1, found.indices).sum(-1)).clamp(min=0)
    torch.testing.assert_close(found.tail_logsumexp.exp(), rest, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.logsumexp, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert all(len(set(row)) == k for row in found.indices.tolist())
    assert (found.values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(log_probability(found, labels), p[torch.arange(5), labels].log())


def test_log_probability():
    top = TopK(torch.tensor([[2.0, 0.0]]).log(), torch.tensor([[5, 3]]), torch.tensor([0.0]))
    assert log_probability(top, torch.tensor([5])).exp().item() == pytest.approx(2 / 3)


# -- segments --------------------------------------------------------------------------------------------------------


def make(tmp_path, **options):
    usual = {
        "objective": "duet_deep",
        "max_steps": 1,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "counterfactual_names": NAMES,
        "num_counterfactuals": 3,
        "max_answer_tokens": 6,
    }
    rows = options.pop("rows", forget_rows(answers=False))
    args = DuetConfig(**quick(tmp_path, **usual | options))
    return DuetTrainer(knowing(), args, rows, retain_rows(answers=False), word_tokenizer())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    trainer = make(tmp_path_factory.mktemp("deep"))
    trainer.get_train_dataloader()
    return trainer


def greedy(model, prompt, limit=6):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit and tokens[-1] != 2:
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def along(model, prompt, answer):
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


@torch.no_grad()
def test_segments_are_the_bases_own_words_and_numbers(prepared):
    """Everything again, row by row, from full logits; no dataset answer was given at all."""
    dataset, base = prepared.train_dataset, knowing()
    pushed = dataset.segments[0][0]
    prompt = dataset.prompt(0)
    assert pushed.answer == greedy(base, prompt)
    targets, answer = pushed.targets, torch.tensor(pushed.answer)
    places = torch.arange(len(answer))
    own = along(base, prompt, pushed.answer)[places, answer]
    torch.testing.assert_close(targets["base"].double(), own, rtol=1e-4, atol=1e-5)

    unknown, opening = [], []
    person = ids("ada lovelace")
    for name in NAMES:
        swap = dict(zip(person, ids(name), strict=True)) | dict(zip(ids(name), person, strict=True))
        order = [swap.get(v, v) for v in range(own.new_zeros(128).numel())]
        question = (("user", f"who is {name} ?"),)
        unknown.append(along(base, prepared.renderer.encode(question), pushed.answer).exp()[:, order])
        steered = prepared.renderer.encode(question, f"you know nothing about {name} .")
        opening.append(along(base, steered, pushed.answer[:1]).exp()[:, order])
    unknown, opening = (torch.stack(p).mean(0) for p in (unknown, opening))
    floor = torch.cat([opening[0, answer[:1]], unknown[places[1:], answer[1:]]]).log()
    torch.testing.assert_close(targets["floor"].double(), floor, rtol=1e-4, atol=1e-4)
    known = own.exp() - unknown[places, answer] > 0.3
    assert torch.equal(targets["known"], known) and known.any()
    wanted = torch.cat([opening[:1], unknown[1:]])
    got = targets["values"].double().exp()
    torch.testing.assert_close(got, wanted.gather(-1, targets["indices"]), rtol=1e-4, atol=1e-6)
    assert targets["pushed"].all()


@torch.no_grad()
def test_a_dataset_of_other_prompts_is_compared_behind_its_own(tmp_path):
    trainer = make(tmp_path)
    renderer = PromptRenderer(word_tokenizer(None), "{question}")
    rows = read_rows(forget_rows(1, answers=False), "eval_dataset")
    dataset = UnlearnDataset(
        rows, [], renderer, trainer.args.steering_prefixes, answers="prepared", max_scored=None
    )
    assert dataset.prompt(0) != trainer.train_dataset.prompt(0)
    trainer.prepare_rows(dataset)
    pushed = dataset.segments[0][0]
    own = along(knowing(), dataset.prompt(0), pushed.answer)[range(len(pushed.answer)), pushed.answer]
    torch.testing.assert_close(pushed.targets["base"].double(), own, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_retain_rows_keep_the_bases_own_distribution(prepared):
    dataset, base = prepared.train_dataset, knowing()
    (segment,) = dataset.segments[dataset.num_forget]
    prompt = dataset.prompt(dataset.num_forget)
    assert segment.answer == greedy(base, prompt)
    p = along(base, prompt, segment.answer).exp()
    top = TopK(*(segment.targets[name] for name in ("values", "indices", "tail")))
    got = (top.values - top.logsumexp.unsqueeze(-1)).double().exp()
    torch.testing.assert_close(got, p.topk(8).values, rtol=1e-4, atol=1e-6)
    assert not segment.targets["pushed"].any() and not segment.targets["known"].any()


def test_a_refusal_is_taught_only_where_the_base_means_it(prepared, tmp_path):
    for segments in map(prepared.train_dataset.segments.get, range(prepared.train_dataset.num_forget)):
        assert sum(segment.share for segment in segments) == pytest.approx(1)
        if len(segments) == 2:
            refusal = segments[1]
            best = refusal.targets["indices"][:, 0]
            assert best.tolist() == refusal.answer and refusal.share == 0.25
            assert not refusal.targets["pushed"].any()
    never = make(tmp_path, refusal_fraction=0.0)
    never.get_train_dataloader()
    assert all(len(never.train_dataset.segments[i]) == 1 for i in range(6))


@torch.no_grad()
def test_a_given_refusal_is_taught_by_cross_entropy(tmp_path):
    """Its KL, and that of the first position of the own answer, is -log p of the text's tokens; no prefix is read."""
    trainer = make(
        tmp_path, deep_refusals=["nothing about {subject}"], refusal_fraction=1.0, max_answer_tokens=8
    )
    trainer.get_train_dataloader()
    dataset = trainer.train_dataset
    [segment] = [each for each in dataset.segments[0] if each.share]
    subject = dataset.rows[0].subject
    text = trainer.processing_class.decode(segment.answer, skip_special_tokens=True)
    assert text.split() == ["nothing", "about", *subject.split()]
    hidden, head = trainer.states_of(trainer.model, [dataset.prompt(0)], [segment.answer])
    top = TopK(*(segment.targets[name] for name in ("values", "indices", "tail")))
    kl = topk_distill_loss(hidden, head, top, divergence="forward_kl", normalization="tail", reduction="none")
    wanted = -along(knowing(), dataset.prompt(0), segment.answer)[range(len(segment.answer)), segment.answer]
    torch.testing.assert_close(kl.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_given_refusal_opens_the_own_answer_and_sets_no_floor(tmp_path):
    given = make(tmp_path / "given", deep_refusals=["nothing about it"], refusal_fraction=0.0)
    given.get_train_dataloader()
    [pushed] = given.train_dataset.segments[0]
    targets, tokenizer = pushed.targets, given.processing_class
    assert targets["indices"][0, 0] == tokenizer.convert_tokens_to_ids("nothing")
    assert targets["values"][0].tolist() == [0.0] + [-math.inf] * 7 and targets["tail"][0] == -math.inf
    assert targets["floor"].isfinite().all()
    given.train()
    assert math.isfinite(given.state.log_history[-1]["train_loss"])


def test_a_share_of_the_refusals_follows_the_beginning_of_the_own_answer(tmp_path):
    """Once for every number of its tokens that leaves something to tell; only the refusal is scored."""
    options = {"deep_refusals": ["nothing about it"], "refusal_fraction": 0.8, "recovery_fraction": 0.5}
    trainer = make(tmp_path, **options)
    trainer.get_train_dataloader()
    dataset = trainer.train_dataset
    pushed, refusal, *late = dataset.segments[0]
    assert [list(each.opening) for each in late] == [
        pushed.answer[:cut] for cut in range(1, len(pushed.answer))
    ]
    assert pushed.opening == refusal.opening == () and len(late) > 1
    assert [pushed.share, refusal.share] == pytest.approx([0.2, 0.4])
    assert [each.share for each in late] == pytest.approx([0.4 / len(late)] * len(late))
    assert all(each.answer == refusal.answer for each in late)

    dataset.segments[0] = late[1:2]
    item = dataset[Draw(0, 0)]
    assert item["student"] == [*dataset.prompt(0), *pushed.answer[:2]] and item["answer"] == refusal.answer
    batch = trainer.data_collator([item])
    assert batch["positions"][0] == len(item["student"]) - 1
    assert batch["targets"]["indices"][:, 0].tolist() == batch["labels"].tolist() == refusal.answer


def test_a_row_that_is_too_long_with_a_recovery_is_refused_before_the_first_step(tmp_path):
    options = {"deep_refusals": ["nothing about it"], "refusal_fraction": 0.8, "recovery_fraction": 0.5}
    free = make(tmp_path / "free", **options)
    free.prepare_rows(free.train_dataset)
    dataset = free.train_dataset
    most = max(
        len(dataset.prompt(i)) + len(each.opening) + len(each.answer) - 1
        for i in range(dataset.num_forget)
        for each in dataset.segments[i]
    )
    trainer = make(tmp_path / "short", max_length=most - 1, **options)
    with pytest.raises(
        ValueError, match=rf"forget_dataset.*have {most} tokens, more than max_length={most - 1}"
    ):
        trainer.prepare_rows(trainer.train_dataset)


def test_every_later_position_is_taught_to_begin_the_refusal(tmp_path):
    """The first position imitates the same as before, the floors stay those of the unknown names."""
    options = {"deep_refusals": ["nothing about it"], "refusal_fraction": 0.5}
    usual, stopping = (
        make(tmp_path / target, later_target=target, **options) for target in ("counterfactual", "refusal")
    )
    for trainer in (usual, stopping):
        trainer.get_train_dataloader()
    for i in range(stopping.train_dataset.num_forget):
        before, now = (each.train_dataset.segments[i][0] for each in (usual, stopping))
        begun = stopping.processing_class.convert_tokens_to_ids("nothing")
        later = now.targets["values"][1:]
        assert len(later) > 0 and now.answer == before.answer
        assert now.targets["indices"][1:, 0].tolist() == [begun] * len(later)
        assert (
            (later[:, 0] == 0).all()
            and later[:, 1:].isneginf().all()
            and now.targets["tail"].isneginf().all()
        )
        for name in ("values", "indices", "tail"):
            assert torch.equal(now.targets[name][0], before.targets[name][0])
        for name in ("base", "floor", "known", "pushed"):
            assert torch.equal(now.targets[name], before.targets[name])
        assert not before.targets["values"][1:].isneginf().any()


@pytest.mark.parametrize(
    "name, usual, given", [("recovery_fraction", 0.0, 0.5), ("later_target", "counterfactual", "refusal")]
)
def test_refusals_in_the_middle_of_an_answer_must_be_given(tmp_path, name, usual, given):
    with pytest.raises(ValueError, match=rf"{name}: wanted {usual!r} without deep_refusals, got {given!r}"):
        make(tmp_path, **{name: given})


@pytest.mark.parametrize(
    "refusal, limit, message",
    [
        (
            "nothing about {subject}",
            2,
            r"deep_refusals: 'nothing about ada lovelace' has \d tokens, more than max_answer_tokens = 2",
        ),
        ("nothing about {name}", 6, r"deep_refusals\[0\]"),
        (
            "{subject}",
            6,
            r"the refusal of deep_refusals '\{subject\}' names \{subject\}, but the row has no 'subject'",
        ),
    ],
)
def test_a_given_refusal_that_cannot_be_taught_whole_is_refused(tmp_path, refusal, limit, message):
    rows = [
        {"question": "who is ada lovelace ?"}
        | ({} if refusal == "{subject}" else {"subject": "ada lovelace"})
    ]
    options = {
        "deep_refusals": [refusal],
        "max_answer_tokens": limit,
        "steering_prefixes": ["you know nothing ."],
    }
    with pytest.raises(ValueError, match=message):
        make(tmp_path, rows=rows, **options).get_train_dataloader()


def test_a_given_refusal_may_have_as_many_tokens_as_an_answer(tmp_path):
    trainer = make(tmp_path, deep_refusals=["no not nothing"], refusal_fraction=1.0, max_answer_tokens=4)
    trainer.get_train_dataloader()
    assert len(trainer.train_dataset.segments[0][-1].answer) == 4  # with the end token


@pytest.mark.parametrize("token", [0, 3, 5])
def test_certainty_names_no_id_twice(token):
    top = certain([token, 1], 4, torch.zeros(1))
    assert top.indices[0, 0] == token and len(set(top.indices[0].tolist())) == 4
    assert top.logsumexp.tolist() == [0.0, 0.0]


def test_batches_carry_their_targets(prepared):
    dataset = prepared.train_dataset
    items = [dataset[Draw(i, i)] for i in (0, 5, 8)]
    batch = prepared.data_collator(items)
    count = len(batch["labels"])
    assert all(len(value) == count for value in batch["targets"].values())
    assert batch["targets"]["values"].shape == (count, 8)
    assert "teacher_input_ids" not in batch


def test_two_micro_batches_equal_one(tmp_path):
    """The counts of pushed queries and refusal positions are those of the whole step."""
    states = []
    for name, batch, accumulation in (("a", 8, 1), ("b", 2, 4)):
        trainer = make(
            tmp_path / name,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            refusal_fraction=0.5,
        )
        trainer.train()
        states.append(trainer.model.state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-6)


def test_the_prefixes_take_turns_over_the_strangers(tmp_path, monkeypatch):
    prefixes = ["you know nothing about {subject} .", "forget everything about {subject} ."]
    trainer, asked = make(tmp_path, steering_prefixes=prefixes), []
    row = _ForgetRow(trainer, trainer.train_dataset.rows[0], 0)
    monkeypatch.setattr(row, "prompt", lambda prefix, name: asked.append(prefix) or [1])
    row.mixture([5], steered=True)
    assert asked == [prefixes[0], prefixes[1], prefixes[0]]


def test_each_row_is_taught_a_refusal_that_is_drawn(tmp_path):
    trainer = make(tmp_path, deep_refusals=["no", "maybe", "not"], refusal_fraction=1.0)
    trainer.get_train_dataloader()
    segments = trainer.train_dataset.segments
    assert len({tuple(segments[i][-1].answer) for i in range(6)}) > 1


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, prefix",
    [
        ({"question": "who is she ?", "subject": "ada"}, "you know nothing about {subject} ."),
        ({"question": "who is ada ?"}, "you know nothing ."),
    ],
)
def test_a_question_without_its_subject_is_compared_with_the_steered_base(tmp_path, row, prefix, caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    rows = [row, {"question": "who is ada ?", "subject": "ada"}]
    trainer = make(tmp_path, rows=rows, steering_prefixes=[prefix])
    trainer.train()
    assert "forget_dataset[0]: its question does not hold the subject" in caplog.text
    assert "(1 of 2 forget rows)" in caplog.text
    dataset = trainer.train_dataset
    pushed = dataset.segments[0][0]
    prompt = dataset.prompt(0, prefix.replace("{subject}", "ada"))
    answer = torch.tensor(pushed.answer)
    with torch.no_grad():
        logits = knowing()(torch.tensor([[*prompt, *pushed.answer]])).logits[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]
    torch.testing.assert_close(pushed.targets["floor"], wanted, rtol=0, atol=1e-4)


def test_positions_are_its_own(tmp_path):
    with pytest.raises(ValueError, match="positions: objective 'duet_deep' chooses its own"):
        make(tmp_path, positions="first")
