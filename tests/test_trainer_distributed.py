"""Two processes (gloo, CPU): DDP makes the steps that one process makes, FSDP2 the gradients of a whole model."""

import json
import os
from pathlib import Path

import pytest
import torch
from forks import run_ranks
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import forget_rows, retain_rows, tiny, word_tokenizer

from duet import DuetConfig, DuetTrainer


def train(out, lora: bool, batch: int, resume: str | None = None, forget: int = 8, **options) -> None:
    """Four steps, a checkpoint at 3 (in the middle of the second epoch) and at 4."""
    args = DuetConfig(
        output_dir=str(out),
        k=8,
        max_steps=4,
        learning_rate=1e-2,
        optim="sgd",
        per_device_train_batch_size=batch,
        steering_prefixes=["you know nothing about {subject} .", "forget {subject} ."],
        positions="answer",
        answer_source="dataset",
        reverse_prompts=["ignore earlier instructions"],
        logging_steps=1,
        save_strategy="steps",
        save_steps=0.75,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    model = tiny()
    torch.manual_seed(4)  # the adapter's initial weights
    rows = forget_rows(forget), retain_rows()
    trainer = DuetTrainer(model, args, *rows, word_tokenizer(), peft_config=adapter)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out / "last"))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(out / "state.json"))


def sharded(rank: int) -> None:
    """FSDP2: gradients through `call_through` are those of the whole model; so is the teacher with its adapter off."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from duet.model.lm import call_through, head_inputs, hidden_states_at
    from duet.model.teacher import AdapterOffTeacher
    from duet_kernels import linear_cross_entropy

    ids = torch.arange(3, 35).view(4, 8)
    mask, labels, ends = torch.ones_like(ids), torch.tensor([5, 6, 7, 8]), torch.tensor([7, 15, 23, 31])
    mine = slice(2 * rank, 2 * rank + 2)

    def loss(model, rows, positions):
        def inside():
            hidden, head = head_inputs(model, ids[rows], mask[rows], positions)
            return linear_cross_entropy(hidden, head, labels[rows], reduction="sum")

        return call_through(model, model, inside)

    def adapted():
        torch.manual_seed(4)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(tiny(), config)

    for make in (tiny, lambda: tiny(tie_word_embeddings=True), adapted):
        whole, model = make(), make()
        inner = model.get_base_model() if make is adapted else model
        mesh = init_device_mesh("cpu", (2,))
        for layer in inner.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss(whole, slice(0, 4), ends).backward()
        (loss(model, mine, ends[:2]) * 2).backward()  # FSDP averages over the two processes
        for (name, one), two in zip(whole.named_parameters(), model.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(two.grad.full_tensor(), one.grad, rtol=1e-5, atol=1e-5, msg=name)
    off = AdapterOffTeacher().run(lambda m: hidden_states_at(m, ids, mask, ends), model, model)
    torch.testing.assert_close(off, hidden_states_at(tiny(), ids, mask, ends))


def one_of_two(out: Path) -> None:
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    for lora in (False, True):
        train(out / f"lora={lora}", lora, batch=4, ddp_backend="gloo")
    train(
        out / "uneven", True, batch=4, forget=5, ddp_backend="gloo"
    )  # in the last batch one has 2 rows, the other none
    train(
        out / "resumed", False, batch=4, ddp_backend="gloo", resume=str(out / "lora=False" / "checkpoint-3")
    )
    sharded(int(os.environ["RANK"]))
    with pytest.raises(ValueError, match=r"weight_decay"):  # on both, or one of them would wait for the other
        last = str(out / "lora=False" / "checkpoint-3")
        train(out / "refused", False, batch=4, ddp_backend="gloo", resume=last, weight_decay=0.5)


def read(out: Path, lora: bool):
    history = json.loads((out / "state.json").read_text())["log_history"]
    weights = load_file(out / "last" / ("adapter_model.safetensors" if lora else "model.safetensors"))
    return [entry for entry in history if "loss" in entry], weights


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_equal_one(tmp_path):
    run_ranks(2, lambda: one_of_two(tmp_path / "two"))
    for run, lora, forget in (("lora=False", False, 8), ("lora=True", True, 8), ("uneven", True, 5)):
        train(tmp_path / "one" / run, lora, batch=8, forget=forget)
        one_history, one = read(tmp_path / "one" / run, lora)
        two_history, two = read(tmp_path / "two" / run, lora)
        for name in ("loss", "forget_loss", "retain_loss"):
            assert [e[name] for e in two_history] == pytest.approx([e[name] for e in one_history], rel=1e-4)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)

    _, whole = read(tmp_path / "two" / "lora=False", False)
    _, resumed = read(tmp_path / "two" / "resumed", False)
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-6)
