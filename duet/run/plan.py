"""The memory of a training step, without loading anything.

A model is made without weights (on the meta device), and one step runs on fake tensors: every operation computes only
shapes, and the bytes of live tensors are counted. So the activations are those of the architecture itself, not of a
formula. What does not run here (optimizer states, quantised weights, the loss) is calculated.

    standing   weights + adapter + optimizer states + the teacher's weights
    peak       standing + the largest of
                   the teacher's forward
                   the student's activations + the loss workspace
                   the student's backward, gradients included
"""

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..model.lm import find_backbone

TEACHERS = ("adapter off", "copy", "before training", "cache", "none")
# States per trained parameter. In the parameter's dtype; with `8bit` in the name, a byte each and two scales a block.
_STATES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}
_BLOCK, _SMALL = 256, 4096  # of bitsandbytes: values per scale; tensors below this keep 32 bit
_NF4_BLOCK = 64


@dataclass(frozen=True)
class Settings:
    """What decides how much memory a step needs.

    Attributes:
        batch: queries of a micro-batch.
        length, teacher_length: tokens of the longest sequence, as the student and as the teacher reads it.
        scored: positions of a query that reach the LM head.
        dtype: of the weights.
        autocast: whether the backbone runs in bf16 although the weights do not.
        adapter: fields of `peft.LoraConfig`; None: every weight is trained.
        quantization: of the frozen weights: None, `nf4` or `int8`.
        checkpointing: whether activations are recomputed in the backward.
        accumulation: micro-batches of an optimizer step.
        optim: name of the optimizer, as in TrainingArguments.
        teacher: `adapter off`, `copy` (frozen), `before training` (the student itself, asked first), `cache` (on disk) or
            `none`.
        workspace: bytes that a loss may use (`duet_kernels.set_workspace_bytes`).
    """

    batch: int = 8
    length: int = 256
    teacher_length: int = 384
    scored: int = 1
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False
    adapter: dict[str, Any] | None = None
    quantization: str | None = None
    checkpointing: bool = False
    accumulation: int = 1
    optim: str = "adamw_torch_fused"
    teacher: str = "copy"
    workspace: int = 256 << 20


@dataclass(frozen=True)
class Budget:
    """Where the bytes of a step go; `peak` is what must fit."""

    weights: int
    adapter: int
    optimizer: int
    teacher_weights: int
    gradients: int
    activations: int  # at the end of the student's forward
    loss: int
    teacher_forward: int  # above what stands
    backward: int  # above what stands, gradients included
    trained: int  # parameters, a number
    parameters: int  # of the base model, a number

    @property
    def standing(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.teacher_weights

    @property
    def peak(self) -> int:
        return self.standing + max(self.phases.values())

    @property
    def phases(self) -> dict[str, int]:
        """Bytes above what stands, by phase of a step."""
        return {
            "teacher's forward": self.teacher_forward,
            "loss": self.activations + self.loss,
            "backward": self.backward,
        }


class Planner:
    """Budgets of one architecture. Simulations are kept: budgets that differ in batch or optimizer cost nothing more.

    Args:
        config: of a causal language model.
    """

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self._simulated: dict[tuple, Any] = {}

    def budget(self, settings: Settings) -> Budget:
        """What one optimizer step takes, in bytes.

        Raises:
            ValueError: an optimizer or a teacher that is not known; a model that cannot be simulated.
        """
        if settings.teacher not in TEACHERS:
            raise ValueError(f"teacher: wanted one of {', '.join(TEACHERS)}, got {settings.teacher!r}")
        one, two = (self._simulate(replace(settings, batch=batch)) for batch in (1, 2))
        # Everything is linear in the batch.
        at = {name: one[name] + (two[name] - one[name]) * (settings.batch - 1) for name in one}
        model, adapted = self._made(settings)
        weights = sum(_weight_bytes(model, settings.quantization))
        trained = [p for p in adapted.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        held = gradients if settings.accumulation > 1 else 0
        unpacked = _unpacked(model, settings)
        return Budget(
            weights=weights,
            adapter=gradients if settings.adapter is not None else 0,
            optimizer=sum(optimizer_bytes(settings.optim, p) for p in trained),
            teacher_weights=weights if settings.teacher == "copy" else 0,
            gradients=gradients,
            activations=at["activations"] + held,
            loss=self._loss(settings),
            teacher_forward=at["teacher"] + held + unpacked,
            backward=at["backward"] + unpacked,
            trained=sum(p.numel() for p in trained),
            parameters=sum(p.numel() for p in model.parameters()),
        )

    def largest_batch(self, settings: Settings, memory: int) -> int:
        """The most queries a micro-batch may hold within `memory` bytes; 0 when not even one fits."""
        one, two = (self.budget(replace(settings, batch=batch)).peak for batch in (1, 2))
        if one > memory:
            return 0
        batch = 1 + int((memory - one) // max(1, two - one))
        while batch > 1 and self.budget(replace(settings, batch=batch)).peak > memory:
            batch -= 1  # another phase may lead at a larger batch
        return batch

    # -- simulation ------------------------------------------------------------------------------------------------

    def _made(self, settings: Settings) -> tuple[nn.Module, nn.Module]:
        """(the base model, the model that is trained), without weights."""
        return self._once(("made", settings.dtype, repr(settings.adapter)), lambda: self._make(settings))

    def _make(self, settings: Settings) -> tuple[nn.Module, nn.Module]:
        with torch.device("meta"):
            model, adapted = (
                AutoModelForCausalLM.from_config(self.config, dtype=settings.dtype) for _ in range(2)
            )
            if settings.adapter is not None:
                from peft import LoraConfig, get_peft_model

                adapted = get_peft_model(adapted, LoraConfig(**settings.adapter))
        return model, adapted

    def _simulate(self, settings: Settings) -> dict[str, int]:
        model, adapted = self._made(settings)
        common = settings.batch, settings.dtype, settings.autocast
        teacher = 0
        if settings.teacher in ("adapter off", "copy"):
            key = ("teacher", *common, settings.teacher_length)
            with torch.no_grad():
                teacher = self._once(key, lambda: _step(model.eval(), settings, settings.teacher_length))[
                    "peak"
                ]
        key = ("student", *common, settings.length, repr(settings.adapter), settings.checkpointing)
        student = self._once(key, lambda: _step(adapted.train(), settings, settings.length))
        return {"teacher": teacher, "activations": student["forward"], "backward": student["peak"]}

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._simulated:
            try:
                self._simulated[key] = make()
            except Exception as error:  # whatever the model's own code raises
                name = type(self.config).__name__
                raise ValueError(f"model: {name} cannot be tried out without its weights: {error}") from error
        return self._simulated[key]

    def _loss(self, settings: Settings) -> int:
        vocabulary = self.config.get_text_config().vocab_size
        return min(settings.workspace, 3 * 4 * settings.batch * settings.scored * vocabulary)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive: `now`, and `peak` since it was made.

    Tensors of `standing` are not counted. A storage counts once, however many views it has.
    """

    def __init__(self, standing: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()
        for tensor in (*standing.parameters(), *standing.buffers()):
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


def _step(model: Any, settings: Settings, length: int) -> dict[str, int]:
    """Bytes alive after the backbone's forward, and at the peak of forward and (where there are gradients) backward."""
    shape = settings.batch, length
    with FakeTensorMode(allow_non_fake_inputs=True), _materialised(model):
        if model.training and settings.checkpointing:
            model.activation_checkpointing_enable()
        live = LiveBytes(model)
        with live:
            ids, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16) if settings.autocast else nullcontext():
                output = find_backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)
            scored = output.last_hidden_state[:, -1]
            del output
            forward = live.now
            if scored.requires_grad:  # through the head, whose gradient is dense where it is trained
                model.get_output_embeddings()(scored).sum().backward()
        if model.training and settings.checkpointing:
            model.activation_checkpointing_disable()
    return {"forward": forward, "peak": live.peak}


@contextmanager
def _materialised(model: Any) -> Iterator[None]:
    """Within the context, parameters and buffers on the meta device are (fake) ones of a CPU; shared ones stay shared."""
    places: list[Any] = [
        (table, name)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name in table
    ]
    before = [table[name] for table, name in places]
    made: dict[int, Tensor] = {}
    for (table, name), tensor in zip(places, before, strict=True):
        if tensor is None or tensor.device.type != "meta":
            continue
        if id(tensor) not in made:
            fake = torch.empty_like(tensor, device="cpu")
            made[id(tensor)] = (
                nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
            )
        table[name] = made[id(tensor)]
    try:
        yield
    finally:
        for (table, name), tensor in zip(places, before, strict=True):
            table[name] = tensor  # and with the fake ones go their gradients


# -- what is counted by name ---------------------------------------------------------------------------------------


def _weight_bytes(model: nn.Module, quantization: str | None) -> Iterator[int]:
    """Of each parameter and buffer; quantised: linear layers other than the LM head, as bitsandbytes stores them."""
    small = set() if quantization is None else {id(layer.weight) for layer in _quantised(model)}
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        count = tensor.numel()
        if id(tensor) not in small:
            yield count * tensor.element_size()
        elif quantization == "nf4":  # half a byte; a scale a block, itself in one byte with a scale a block
            scales = -(-count // _NF4_BLOCK)
            yield -(-count // 2) + scales + 4 * -(-scales // _BLOCK)
        else:  # a byte; a scale a row
            yield count + 4 * tensor.shape[0]


def _quantised(model: Any) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]


def _unpacked(model: nn.Module, settings: Settings) -> int:
    """The largest quantised layer, for the moment in which it is multiplied with."""
    if settings.quantization is None:
        return 0
    return max(layer.weight.numel() for layer in _quantised(model)) * settings.dtype.itemsize


def optimizer_bytes(optim: str, parameter: Tensor) -> int:
    """Bytes of one parameter's optimizer states, by the optimizer's name in TrainingArguments.

    Raises:
        ValueError: a name that is not known here.

    Example:
        >>> weight = torch.empty(1024, 1024, dtype=torch.bfloat16)
        >>> [optimizer_bytes(name, weight) >> 20 for name in ("adamw_torch", "paged_adamw_8bit", "sgd")]
        [4, 2, 0]
    """
    name = re.sub(r"^paged_|_(torch|fused|bnb|8bit|32bit|hf|xla|npu)", "", re.sub(r"^paged_", "", str(optim)))
    count = parameter.numel()
    if name == "adafactor":  # a row and a column of second moments
        return 4 * (sum(count // size for size in parameter.shape[-2:]) if parameter.dim() > 1 else count)
    if name not in _STATES:
        raise ValueError(
            f"optim: wanted adafactor or one of {', '.join(_STATES)} in its name, got {str(optim)!r}"
        )
    states = _STATES[name]
    if "8bit" not in str(optim):
        return states * count * (4 if "32bit" in str(optim) else parameter.element_size())
    return states * (4 * count if count < _SMALL else count + 4 * -(-count // _BLOCK))
