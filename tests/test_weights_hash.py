"""duet.model.weights: the hash is the one that its first lines define, sees every bit, and is made once a run."""

import hashlib
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_cached_training import ROWS, cached, config
from test_trainer import make
from tiny_models import tiny, word_tokenizer
from torch import Tensor, nn

from duet import DuetTrainer
from duet.model import weights
from duet.model.weights import BLOCK, weights_hash
from duet.output.record import refuse_another
from duet.store.read import TopKStore
from duet.store.write import StoreWriter


class Held(nn.Module):
    """A model of these tensors."""

    def __init__(self, *tensors: Tensor):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"t{i}", tensor)


def some(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)


def defined(model: nn.Module) -> str:
    """The first lines of the room, in Python's integers."""
    stream = hashlib.shake_256(b"duet-kernels, hash of weights, 2").digest(16 * BLOCK)
    odd = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") | 1 for i in range(2 * BLOCK)]
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        raw += bytes(-len(raw) % 4)
        words = [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)]
        for start in range(0, len(words), BLOCK):
            block = words[start : start + BLOCK]
            for k in range(2):
                total = sum(m * w for m, w in zip(odd[k * BLOCK :], block, strict=False)) % 2**64
                digest.update(total.to_bytes(8, "little"))
    return "2:" + digest.hexdigest()


@pytest.mark.parametrize(
    "tensors",
    [
        [some(7), some(5, torch.float32).reshape(1, 5), some(3, torch.uint8)],
        [some(2 * BLOCK + 3), some(BLOCK, torch.float32)],
        [torch.empty(0), torch.tensor(3.0), some(12, torch.int64).view(3, 4).T],
        [some(2, torch.float8_e4m3fn), torch.tensor([True, False, True])],
    ],
    ids=["small", "more than a block", "empty, scalar, strided", "bytes"],
)
def test_it_is_what_its_definition_says(tensors):
    assert weights_hash(Held(*tensors)) == defined(Held(*tensors))


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK, 3 * BLOCK + 17])
def test_every_way_to_cut_the_work_gives_the_same_sums(length, at_once):
    """The way of a GPU beside that of a CPU."""
    words, odd = some(length, torch.int32), weights._multipliers("cpu")
    assert odd.shape == (2, BLOCK) and bool((odd % 2 != 0).all()) and odd.unique().numel() == 2 * BLOCK
    one, other = (torch.full((-(-length // BLOCK), 2), -1) for _ in range(2))
    weights._one_by_one(words, odd, one)
    weights._many_at_once(words, odd, other, at_once)
    assert torch.equal(one, other)


def test_every_single_bit_is_seen():
    tensor = some(40)
    words, seen = tensor.view(torch.int16), {weights_hash(Held(tensor))}
    for place in range(40):
        for bit in range(16):
            before = words[place].item()
            words[place] ^= torch.tensor(1 << bit if bit < 15 else -(1 << 15), dtype=torch.int16)
            seen.add(weights_hash(Held(tensor)))
            words[place] = before
    assert len(seen) == 1 + 40 * 16 and weights_hash(Held(tensor)) in seen


def test_order_signs_shape_dtype_and_names_count():
    values = some(3 * BLOCK, torch.float32)
    base = weights_hash(Held(values))

    def changed(change) -> str:
        other = values.clone()
        change(other)
        assert not torch.equal(other.view(torch.int32), values.view(torch.int32))
        return weights_hash(Held(other))

    def swap(i, j):
        def change(t):
            t[[i, j]] = t[[j, i]]

        return change

    def signs(*places):  # the upper bit of two words: its weight mod 2^64 is the smallest
        def change(t):
            t.view(torch.int32)[list(places)] ^= -(2**31)

        return change

    found = [changed(swap(0, 1)), changed(swap(3, BLOCK + 3)), changed(signs(5, 9))]
    found += [changed(signs(5, BLOCK + 5)), changed(lambda t: t.copy_(t.roll(BLOCK)))]
    found += [changed(lambda t: t.copy_(t.flip(0)))]
    found += [weights_hash(Held(values.view(3, -1))), weights_hash(Held(values.view(torch.int32)))]
    found += [
        weights_hash(Held(values, torch.zeros(2))),
        weights_hash(Held(torch.cat([values, torch.zeros(1)]))),
    ]
    halves = Held(values[:BLOCK], values[BLOCK:])
    swapped = Held(values[BLOCK:], values[:BLOCK])
    assert len({base, *found, weights_hash(halves), weights_hash(swapped)}) == len(found) + 3


def test_views_count_by_their_values():
    """A slice that starts between two words, a transposed one, an expanded one."""
    values = some(101)
    for view in (values[1:], values[3:].view(14, 7).T, values[:1].expand(9)):
        assert weights_hash(Held(view)) == weights_hash(Held(view.clone().contiguous()))


def test_an_adapter_does_not_count(tmp_path):
    wanted = weights_hash(tiny())
    options = {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(tiny(), LoraConfig(r=2, init_lora_weights=False, **options))
    assert weights_hash(adapted) == wanted
    with torch.no_grad():
        adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight[0, 0] += 1
    assert weights_hash(adapted) != wanted


def test_the_host_asks_once(monkeypatch):
    """Not for every tensor: on a GPU each question would wait for all that was queued."""
    model, calls, cpu = tiny(), [], Tensor.cpu
    assert len(model.state_dict()) > 10
    monkeypatch.setattr(Tensor, "cpu", lambda self: calls.append(1) or cpu(self))
    monkeypatch.setattr(Tensor, "item", lambda self: calls.append(2))
    monkeypatch.setattr(Tensor, "tolist", lambda self: calls.append(3))
    weights_hash(model)
    assert calls == [1]


# -- who asks for it ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    calls = []

    def count(model):
        calls.append(model)
        return weights_hash(model)

    monkeypatch.setattr("duet.trainer.weights_hash", count)
    monkeypatch.setattr("duet.store.provenance.weights_hash", count)
    return calls


def test_it_is_made_once_a_run(tmp_path, counted):
    trainer = make(tmp_path / "alone", max_steps=1)
    trainer.train()
    trainer.train()
    assert len(counted) == 1
    trainer = make(tmp_path / "taught", max_steps=1, trainer_options={"teacher_model": tiny(seed=3)})
    trainer.train()
    trainer.train()
    assert len(counted) == 3, "of the student and of the teacher"
    store = cached(tmp_path)
    assert len(counted) == 4
    trainer = DuetTrainer(
        tiny(), config(tmp_path), *ROWS, processing_class=word_tokenizer(), teacher_store=store
    )
    trainer.train()
    assert len(counted) == 5, "the store's question and the record's have one answer"
    record = json.loads((tmp_path / "out" / "run_record.json").read_text())
    assert record["weights"] == store.provenance.weights and record["teacher"] == store.provenance.seal


OLD = "0123456789abcdef0123456789abcdef"


def test_a_store_with_the_hash_of_an_older_version_is_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr("duet.store.provenance.weights_hash", lambda model: OLD)
    old = cached(tmp_path)
    monkeypatch.undo()
    assert TopKStore(old.folder).provenance.weights == OLD
    options = {"processing_class": word_tokenizer(), "teacher_store": old}
    with pytest.raises(
        ValueError,
        match=r"weights: the store was made by an older version .* Cache the teacher anew .* teacher_store_same_model",
    ):
        DuetTrainer(tiny(), config(tmp_path), *ROWS, **options)
    DuetTrainer(tiny(), config(tmp_path, teacher_store_same_model=False), *ROWS, **options)
    with pytest.raises(ValueError, match="weights: the store was made by an older version"):
        StoreWriter(old.folder, cached(tmp_path, folder="new").provenance, {}).begin()


def test_a_record_with_the_hash_of_an_older_version_goes_on_with_a_warning(caplog):
    now = weights_hash(tiny())
    with caplog.at_level("WARNING", "duet.output.record"):
        refuse_another({"weights": OLD, "k": 8}, {"weights": now, "k": 8}, "out")
    assert "weights: the run in 'out' was begun by an older version of duet" in caplog.text
    with pytest.raises(ValueError, match=r"^weights: the run in 'out' began with '2:"):
        refuse_another({"weights": weights_hash(tiny(seed=1))}, {"weights": now}, "out")
    with pytest.raises(ValueError, match=r"^teacher: the run in 'out' began with '0123"):  # two stores
        refuse_another({"teacher": OLD}, {"teacher": OLD[::-1]}, "out")
