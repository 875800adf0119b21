"""Every block of RECIPES.md runs as it stands, is short, gives the loss it promises, and never makes logits."""

import contextlib
import math
import pathlib
import queue
import re
import sys
import types

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


def expected(student, teacher, ids, mask, tail=False, T=1.0):
    """KL of the teacher's top-k, renormalised or with a tail, by full logits in fp64."""
    with torch.no_grad():
        theirs = (teacher.double()(ids).logits[mask] / T).log_softmax(-1)
    ours, indices = (student.double()(ids).logits[mask] / T).log_softmax(-1), theirs.topk(K).indices
    logp, logq = (x.gather(-1, indices) for x in (theirs, ours))
    if tail:
        logp, logq = (torch.cat([x, torch.log1p(-x.exp().sum(-1, True))], -1) for x in (logp, logq))
    logp, logq = logp.log_softmax(-1), logq.log_softmax(-1)
    return F.kl_div(logq, logp, log_target=True, reduction="none").sum(-1).mean()


def predicting(labels):
    """The positions whose prediction counts: hidden state t predicts token t + 1."""
    return F.pad(labels[:, 1:] != -100, (0, 1))


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
        if closure is not None:
            closure()
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
    assert len(RECIPES) == TEXT.count("```python") == 8
    for name, code in RECIPES.items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) < (30 if name == "TRL: async distillation" else 15), (name, len(lines))
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


def test_labels_and_a_teacher(pair):
    """Half the cross-entropy and half the divergence, of the tokens that the labels count, from full logits in fp64."""
    student, teacher = pair
    ids, counted = batch_of(rows=16)
    labels, optimizer = torch.where(counted, ids, -100), Recorder(student)
    batches = [{"ids": ids[rows], "labels": labels[rows]} for rows in (slice(0, 8), slice(8, 16))]
    with without_logits(8 * 20):
        run("Labels and a teacher", student=student, teacher=teacher, optimizer=optimizer, batches=batches)
    assert len(optimizer.steps) == 2
    soft = expected(student, teacher, ids[:8], predicting(labels[:8]), tail=True)
    hard = F.cross_entropy(student(ids[:8]).logits[:, :-1].flatten(0, 1), labels[:8, 1:].flatten())
    ((soft + hard) / 2).backward()
    assert_near(optimizer.steps[0], grads(student))


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_trainer(tied, pair, tmp_path):
    """The head learns nothing; an input embedding that is tied to it does."""
    student, teacher = pair
    if tied:
        student = tiny(vocab_size=V, hidden_size=16, seed=1, tie_word_embeddings=True)
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
    student.lm_head.forward = lambda x: F.linear(x, student.lm_head.weight.detach())
    loss = expected(student, teacher, batch["input_ids"], predicting(batch["labels"]))
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(optimizer.steps) == 1 and "model.embed_tokens.weight" in optimizer.steps[0]
    assert_near(optimizer.steps[0], grads(student))


def test_a_teacher_that_spoke_once(pair):
    student, teacher = pair
    ids, _ = batch_of(rows=16)
    optimizer = Recorder(student)
    names = {"student": student, "teacher": teacher, "optimizer": optimizer, "DataLoader": DataLoader}
    with without_logits(8 * 20):
        run("A teacher that spoke once", dataset=Dataset.from_dict({"ids": ids.tolist()}), **names)
    assert len(optimizer.steps) == 2
    expected(student, teacher, ids[8:], torch.ones(8, 20, dtype=torch.bool), tail=True, T=2.0).backward()
    assert_near(optimizer.steps[1], grads(student))


# --- the sums of TRL's async distillation, against the equations in plain torch --------------------------------------


class Row:
    """What TRL hands to `_chunked_jsd_loss`: 40 tokens, 5 slots each, of which the last are absent on some rows.

    Of the first token the teacher is sure: log p = 0, and nothing is left for the tail.
    """

    def __init__(self, beta, tail, temperature=2.0, teachers=2, dtype=torch.float64, size=300):
        self.hidden = torch.randn(40, 16, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(size, 16, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(size, dtype=dtype, requires_grad=True)
        self.ids = torch.rand(40, size).topk(5).indices
        self.logp = torch.randn(40, size).log_softmax(-1).gather(-1, self.ids)
        self.present = torch.arange(5) < torch.randint(1, 6, (40, 1))
        self.logp[0, 0], self.present[0, 1:] = 0, False
        self.beta, self.tail, self.temperature, self.teachers = beta, tail, temperature, teachers
        self.teacher = torch.randint(teachers, (40,)) if teachers > 1 else None

    def arguments(self):
        ids = self.ids.masked_fill(~self.present, -1)
        head = self.weight, self.bias, 0.5, 8.0
        of_teacher = ids, self.logp, self.present
        options = self.beta, self.temperature, self.tail, self.teacher, self.teachers, 256
        return self.hidden, *head, *of_teacher, *options

    def leaves(self):
        return self.hidden, self.weight, self.bias

    def by_equation(self):
        """(loss, jsd, entropy of the student, of the teacher, sums of each teacher) from full logits, slot by slot."""
        z = 8 * torch.tanh(0.5 * (self.hidden @ self.weight.T + self.bias) / 8) / self.temperature
        log_q = z.log_softmax(-1)
        losses, entropies = [], []
        for row, (ids, logp, present) in enumerate(zip(self.ids, self.logp, self.present, strict=True)):
            p, q = logp[present].to(z.dtype).exp(), log_q[row, ids[present]].exp()
            if self.tail:
                p, q = (torch.cat([x, (1 - x.sum(0, True)).clamp(min=1e-7)]) for x in (p, q))
            p, q = p / p.sum(), q / q.sum()
            m = self.beta * p + (1 - self.beta) * q
            of_teacher, of_student = (p * (p / m).log()).sum(), (q * (q / m).log()).sum()
            losses.append(self.beta * of_teacher + (1 - self.beta) * of_student)
            if self.beta in (0, 1):
                losses[-1] = (p * (p / q).log()).sum() if self.beta == 0 else (q * (q / p).log()).sum()
            entropies.append(-(p * p.log()).sum())
        loss, told = torch.stack(losses), torch.stack(entropies)
        of_each = torch.zeros(self.teachers, 3, dtype=z.dtype)
        for teacher in range(self.teachers):
            of = (
                self.teacher == teacher if self.teacher is not None else torch.zeros(len(z), dtype=torch.bool)
            )
            of_each[teacher] = torch.stack([of.sum().to(z.dtype), loss.detach()[of].sum(), told[of].sum()])
        entropy = -(log_q.exp() * log_q).sum().detach()
        return loss.sum(), loss.detach().sum(), entropy, told.sum(), of_each.flatten()


def assert_same_sums(found, wanted, leaves, rtol):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, check_dtype=False)
    ours, theirs = (torch.autograd.grad(sums[0], leaves) for sums in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-5
        torch.testing.assert_close(one, other, rtol=0, atol=rtol * float(other.abs().max()))


@pytest.fixture
def shell(monkeypatch):
    """TRL's module and class as far as the recipe leans on them, so that its sums run where TRL is not installed."""
    module = types.ModuleType("trl.experimental.async_distillation.async_distillation_trainer")
    module._chunked_jsd_loss = lambda *arguments: pytest.fail("the loss that was to be replaced ran")

    class AsyncDistillationTrainer:
        def _compute_loss(self, unwrapped_model, inputs):
            return module._chunked_jsd_loss(*inputs)

    package = types.ModuleType("trl.experimental.async_distillation")
    package.AsyncDistillationTrainer, package.async_distillation_trainer = AsyncDistillationTrainer, module
    for name in ("trl", "trl.experimental"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return module


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_sums_of_async_distillation(shell, beta, tail):
    trainer = run("TRL: async distillation")["LeanAsyncDistillationTrainer"]()
    replaced = shell._chunked_jsd_loss
    row = Row(beta, tail, teachers=2 if tail else 1)
    found = trainer._compute_loss(None, row.arguments())
    assert shell._chunked_jsd_loss is replaced  # for others in the same process
    assert_same_sums(found, row.by_equation(), row.leaves(), rtol=2e-6)  # the log-probabilities are fp32


def test_sums_of_async_distillation_make_no_logits(shell):
    trainer = run("TRL: async distillation")["LeanAsyncDistillationTrainer"]()
    row = Row(0.0, True, dtype=torch.float32, size=V)
    arguments = [x.repeat(12, 1) if isinstance(x, torch.Tensor) and len(x) == 40 and x.dim() == 2 else x
                 for x in row.arguments()]  # fmt: skip
    arguments[-3], arguments[-2] = None, 1
    with without_logits(480):
        trainer.sums(*arguments)[0].backward()


# --- Lightning, where it is installed -------------------------------------------------------------------------------


def test_lightning(pair):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    student, teacher = pair
    ids, mask = batch_of()
    module = run("Lightning", student=student, teacher=teacher)["Distill"](student, teacher)
    optimizer = Recorder(student)
    module.configure_optimizers = lambda: optimizer
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", enable_model_summary=False, **quiet, log_every_n_steps=1
    )
    with without_logits(ids.numel()):
        trainer.fit(module, DataLoader([{"ids": i, "mask": m} for i, m in zip(ids, mask, strict=True)], 8))
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    student.zero_grad()
    expected(student, teacher, ids, mask).backward()
    assert len(optimizer.steps) == 1
    assert_near(optimizer.steps[0], grads(student))


# --- TRL, where it is installed -------------------------------------------------------------------------------------


def arguments(kind, tmp_path, **options):
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False}
    return kind(output_dir=str(tmp_path), per_device_train_batch_size=4, **quiet | options)


def against_its_parent(trainer, inputs, tokens, num_items=None, rel=2e-4):
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
    assert theirs > 1e-5 and ours == pytest.approx(theirs, rel=min(rel, 1e-4))
    assert_near(found, wanted, rel)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_gkd(beta, pair, tmp_path):
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
    args = arguments(GKDConfig, tmp_path, lmbda=0.0, beta=beta)
    dataset = Dataset.from_list(chats)
    trainer = kind(student, teacher, args, train_dataset=dataset, processing_class=word_tokenizer())
    ids, mask = batch_of(rows=24)  # of fewer tokens a dense loss holds up to half of the rows
    labels = torch.where(mask, ids, -100)
    scored = (labels[:, 1:] != -100).sum()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    against_its_parent(trainer, inputs, int(scored), scored, rel=1e-5)
    trainer.teacher_model.train()
    loss = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=True)[0]
    assert not trainer.teacher_model.training
    with_logits, logits, _ = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=False)
    assert logits.shape == (*ids.shape, trainer.model.config.vocab_size)
    assert loss.item() == pytest.approx(with_logits.item(), rel=1e-5)


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
        "temperature": 0.7,
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
    for mode in (True, False):
        trainer.model.train(mode)
        against_its_parent(trainer, inputs, inputs["completion_ids"].numel())


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_async_sums(beta, tail):
    """The recipe's function and TRL's own on the same row, fp32: values and gradients within 1e-5."""
    theirs = pytest.importorskip("trl.experimental.async_distillation.async_distillation_trainer")
    row = Row(beta, tail, dtype=torch.float32)
    found = run("TRL: async distillation")["LeanAsyncDistillationTrainer"].sums(*row.arguments())
    assert_same_sums(found, theirs._chunked_jsd_loss(*row.arguments()), row.leaves(), rtol=1e-5)


class StandingWorker:
    """A rollout worker that has nothing to do: the test gives the batch itself."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_trl_async_trainer(beta, tmp_path, monkeypatch):
    """`compute_loss` of the whole trainer with two teachers on one packed row: loss, gradients, and all metrics."""
    theirs = pytest.importorskip("trl.experimental.async_distillation.async_distillation_trainer")
    from trl.experimental.async_distillation import AsyncDistillationConfig

    monkeypatch.setattr(theirs, "get_peak_flops_per_device", lambda *_: None)  # it asks for a GPU's name

    model(0).save_pretrained(tmp_path / "student")
    args = arguments(
        AsyncDistillationConfig, tmp_path, beta=beta, max_steps=1, token_budget=1000,
        teacher_server_urls={"a": "http://a", "b": "http://b"}, model_init_kwargs={"attn_implementation": "sdpa"},
    )  # fmt: skip
    trainer = run("TRL: async distillation")["LeanAsyncDistillationTrainer"](
        str(tmp_path / "student"), args, Dataset.from_list([{"prompt": "who is ada"}] * 4), word_tokenizer(),
        rollout_worker=StandingWorker(), weight_transfer=object(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 2
    ids = torch.randint(3, V, (480,))
    told = torch.rand(480, V).topk(9).indices
    told[:, 8] = torch.where((told[:, :8] == ids[:, None]).any(-1), -1, ids)
    logp = (
        (4 * torch.randn(480, V))
        .log_softmax(-1)
        .gather(-1, told.clamp(min=0))
        .masked_fill(told < 0, -math.inf)
    )
    logp = logp.sort(-1, descending=True).values
    row = {
        "attention_mask": torch.ones(480), "completion_mask": torch.rand(480) < 0.9, "input_ids": ids,
        "position_ids": torch.arange(240).repeat(2), "teacher_topk_ids": told, "teacher_topk_logprobs": logp,
        "teacher_id_idx": torch.arange(480) // 240,
    }  # fmt: skip
    inputs = {name: value.unsqueeze(0) for name, value in row.items()}
    inputs |= {
        name: torch.tensor([400.0]) for name in ("global_n_tokens", "global_n_forward_tokens", "mean_seq_len")
    }
    against_its_parent(trainer, inputs, 480, rel=1e-5)
    metrics = trainer._metrics["train"]
    assert {"jsd", "entropy", "teacher_entropy", "teacher_jsd/a", "teacher_entropy/b"} <= metrics.keys()
    for name, (parent, lean) in metrics.items():
        assert lean == pytest.approx(parent, rel=1e-5), name
    assert theirs._chunked_jsd_loss.__module__ == theirs.__name__
