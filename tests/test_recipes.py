"""Every block of RECIPES.md runs as it stands, is short, gives the loss it promises, and never makes logits."""

import contextlib
import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from test_memory import watching
from tiny_models import tiny, word_tokenizer
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

TEXT = (pathlib.Path(__file__).parents[1] / "RECIPES.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))
V, K = 16384, 64


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    torch.manual_seed(0)


def model(seed):
    """So wide a vocabulary that logits of a batch would be the largest tensor by far: V D is less than N V / 4."""
    return tiny(vocab_size=V, hidden_size=16, seed=seed)


def run(name, **names):
    """The names that the recipe leaves behind."""
    names |= {"torch": torch}
    exec(compile(RECIPES[name], f"RECIPES.md, {name}", "exec"), names)
    return names


@contextlib.contextmanager
def without_logits(tokens):
    """No tensor of a quarter of the logits is made in here, inside custom operators or out."""
    with watching() as sizes:
        yield
    assert V * 16 <= sizes.largest < tokens * V / 4, sizes.by


def expected(student, teacher, ids, mask):
    """KL of the renormalised teacher's top-k, by full logits in fp64."""
    ours, theirs = (m.double()(ids).logits[mask] for m in (student, teacher))
    values, indices = theirs.topk(K)
    logp, logq = values.log_softmax(-1), ours.gather(-1, indices).log_softmax(-1)
    return F.kl_div(logq, logp.detach(), log_target=True, reduction="none").sum(-1).mean()


def grads(of):
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


def assert_near(found, wanted, rel=2e-4):
    assert wanted and found.keys() <= wanted.keys()
    for name, grad in found.items():
        error = (grad - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
        assert error < rel, (name, error)


class Recorder(torch.optim.SGD):
    """Keeps the gradients that the recipe made, and does not step."""

    def __init__(self, of):
        super().__init__(of.parameters(), lr=0.0)
        self.of, self.steps = of, []

    def step(self, closure=None):
        self.steps.append(grads(self.of))


@pytest.fixture
def pair():
    student, teacher = model(1), model(2)
    student.lm_head.requires_grad_(False)
    return student, teacher


def batch_of(rows=8, length=20):
    ids = torch.randint(3, V, (rows, length))
    mask = torch.rand(rows, length) < 0.7
    return ids, mask


# --- what is promised -----------------------------------------------------------------------------------------------


def test_recipes_are_short_and_parse():
    assert len(RECIPES) == TEXT.count("```python") == 5
    for name, code in RECIPES.items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) < 15, (name, len(lines))
        assert max(map(len, lines)) <= 110, name
        compile(code, name, "exec")


def test_logits_are_noticed(pair):
    ids, _ = batch_of()
    with pytest.raises(AssertionError, match="aten"), without_logits(ids.numel()):
        pair[0](ids)


def test_plain_loop(pair):
    """A step of three uneven micro-batches has the gradient of its tokens' mean, from full logits in fp64."""
    student, teacher = pair
    ids, mask = batch_of()
    parts = [{"ids": ids[rows], "mask": mask[rows]} for rows in (slice(0, 6), slice(6, 7), slice(7, 8))]
    optimizer = Recorder(student)
    with without_logits(6 * 20):
        run("A plain loop", student=student, teacher=teacher, optimizer=optimizer, steps=[parts, parts])
    assert len(optimizer.steps) == 2
    expected(student, teacher, ids, mask).backward()
    for step in optimizer.steps:
        assert_near(step, grads(student))


def test_transformers_trainer(pair, tmp_path):
    student, teacher = pair
    tokenizer = word_tokenizer()
    rows = [
        {"input_ids": torch.randint(3, V, (length,)).tolist()} for length in (21, 30, 9, 30, 12, 28, 30, 30)
    ]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    names = {"tokenizer": tokenizer, "dataset": rows, "args": args, "student": student, "teacher": teacher}
    names |= {"Trainer": Trainer, "DataCollatorForLanguageModeling": DataCollatorForLanguageModeling}
    trainer = run("transformers.Trainer", **names)["trainer"]
    optimizer = trainer.optimizer = Recorder(student)
    with without_logits(4 * 30):
        trainer.train()
    batch = trainer.data_collator(rows)
    loss = expected(student, teacher, batch["input_ids"], batch["labels"] != -100)
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(optimizer.steps) == 1
    assert_near(optimizer.steps[0], grads(student))


def test_a_teacher_that_spoke_once(pair):
    student, teacher = pair
    ids, _ = batch_of(rows=16)
    optimizer = Recorder(student)
    names = {"student": student, "teacher": teacher, "optimizer": optimizer, "DataLoader": DataLoader}
    with without_logits(8 * 20):
        run("A teacher that spoke once", dataset=Dataset.from_dict({"ids": ids.tolist()}), **names)
    assert len(optimizer.steps) == 2
    expected(student, teacher, ids[8:], torch.ones(8, 20, dtype=torch.bool)).backward()
    assert_near(optimizer.steps[1], grads(student))


# --- TRL, where it is installed -------------------------------------------------------------------------------------


def arguments(kind, tmp_path, **options):
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False}
    return kind(output_dir=str(tmp_path), per_device_train_batch_size=4, **quiet | options)


def against_its_parent(trainer, inputs, tokens, num_items=None):
    """Value and gradients of the recipe's loss and of the class that it replaces."""
    results = []
    parent = type(trainer).__mro__[1]
    for kind, allowed in ((parent, contextlib.nullcontext()), (type(trainer), without_logits(tokens))):
        compute_loss = kind.compute_loss
        trainer.model.zero_grad()
        with allowed:
            loss = compute_loss(trainer, trainer.model, inputs, num_items_in_batch=num_items)
            loss.backward()
        results.append((loss.item(), grads(trainer.model)))
    (theirs, wanted), (ours, found) = results
    assert theirs > 1e-4 and ours == pytest.approx(theirs, rel=1e-4)
    assert_near(found, wanted)


def test_trl_gkd(pair, tmp_path):
    pytest.importorskip("trl.experimental.gkd", reason="trl is not installed")
    from trl.experimental.gkd import GKDConfig

    student, teacher = pair
    chats = [
        {
            "messages": [
                {"role": "user", "content": "who is"},
                {"role": "assistant", "content": "ada lovelace"},
            ]
        }
    ] * 4
    kind = run("TRL: GKD")["LeanGKDTrainer"]
    args = arguments(GKDConfig, tmp_path, lmbda=0.0, beta=0.3)
    dataset = Dataset.from_list(chats)
    trainer = kind(student, teacher, args, train_dataset=dataset, processing_class=word_tokenizer())
    ids, mask = batch_of(rows=24)  # of fewer tokens a dense loss holds up to half of the rows
    labels = torch.where(mask, ids, -100)
    scored = (labels[:, 1:] != -100).sum()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    against_its_parent(trainer, inputs, int(scored), scored)


def test_trl_sdft(tmp_path):
    pytest.importorskip("trl.experimental.sdft", reason="trl is not installed")
    from peft import LoraConfig
    from trl.experimental.sdft import SDFTConfig

    kind = run("TRL: SDFT")["LeanSDFTTrainer"]
    options = {
        "distillation_topk": K,
        "max_completion_length": 20,
        "num_generations": 1,
        "distillation_alpha": 0.3,
    }
    rows = [{"prompt": "who is ada", "privileged_context": "you know nothing about"}] * 4
    trainer = kind(
        model(0),
        arguments(SDFTConfig, tmp_path, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(chat_template=None),
        peft_config=LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        ),
    )
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    inputs = trainer._prepare_inputs(rows)
    assert inputs["completion_mask"].sum() > 40
    inputs["completion_mask"][1, 9:] = 0
    against_its_parent(trainer, inputs, inputs["completion_ids"].numel())
