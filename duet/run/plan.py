"""The memory of a training step, without loading anything.

Activations come from one simulated step (`simulation`). What does not run there (optimizer states, quantised weights, the
loss) is calculated.

    standing   weights + adapter + optimizer states + the teacher's weights + the keys and values of steering prefixes
    peak       standing + the largest of
                   the teacher's forward, and the workspace for its top-k
                   the student's activations + the loss workspace
                   the student's backward, gradients included
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..model.prefix_cache import cannot_reuse
from ..names import check_one_of
from .simulation import Step, simulate, trained_parameters

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
        subjects: whose filled steering prefixes a live teacher reads once.
        dtype: of the weights.
        autocast: whether the backbone runs in bf16 although the weights do not.
        adapter: fields of `peft.LoraConfig`; None: every weight is trained.
        quantization: of the frozen weights: None, `nf4` or `int8`.
        checkpointing: whether activations are recomputed in the backward.
        accumulation: micro-batches of an optimizer step.
        optim: name of the optimizer, as in TrainingArguments.
        teacher: `adapter off`, `copy` (frozen), `before training` (the student itself, asked first), `cache` (on disk) or
            `none`.
        sharp: whether steps are sharpness-aware: two more numbers for each trained weight.
        workspace: bytes that a loss may use (`duet_kernels.set_workspace_bytes`).
    """

    batch: int = 8
    length: int = 256
    teacher_length: int = 384
    scored: int = 1
    subjects: int = 1
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False
    adapter: dict[str, Any] | None = None
    quantization: str | None = None
    checkpointing: bool = False
    accumulation: int = 1
    optim: str = "adamw_torch_fused"
    teacher: str = "copy"
    sharp: bool = False
    workspace: int = 256 << 20

    @property
    def stored(self) -> str:
        """As what the base's weights are stored, in words."""
        return self.quantization or str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Budget:
    """Where the bytes of a step go; `peak` is what must fit."""

    weights: int
    adapter: int
    optimizer: int
    teacher_weights: int
    prefixes: int  # keys and values that a live teacher keeps
    gradients: int
    activations: int  # at the end of the student's forward
    loss: int
    teacher_forward: int  # above what stands
    backward: int  # above what stands, gradients included
    trained: int  # parameters, a number
    parameters: int  # of the base model, a number

    @property
    def standing(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.teacher_weights + self.prefixes

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
        check_one_of("teacher", settings.teacher, TEACHERS)
        weights, parameters, unpacked = self._standing(settings)
        key = "trained", settings.dtype, repr(settings.adapter)
        trained = self._once(key, lambda: trained_parameters(self._model(settings.dtype), settings.adapter))
        gradients = sum(times * p.numel() * p.element_size() for times, p in trained)
        student = self._step(settings, settings.length, trains=True)
        held = gradients if settings.accumulation > 1 else 0
        # What the loss, or the teacher's top-k, works in: three blocks of logits, if they are smaller than the workspace.
        vocabulary = self.config.get_text_config().vocab_size
        loss = min(settings.workspace, 3 * 4 * settings.batch * settings.scored * vocabulary)
        teacher = 0
        if settings.teacher in ("adapter off", "copy"):
            forward = self._step(settings, settings.teacher_length, trains=False).most(settings.batch)
            teacher = max(forward + unpacked, loss) + held
        return Budget(
            weights=weights,
            adapter=gradients if settings.adapter is not None else 0,
            optimizer=sum(times * optimizer_bytes(settings.optim, p) for times, p in trained)
            + (2 * gradients if settings.sharp else 0),
            teacher_weights=weights if settings.teacher == "copy" else 0,
            prefixes=self._prefixes(settings),
            gradients=gradients,
            activations=student.kept(settings.batch) + held,
            loss=loss,
            teacher_forward=teacher,
            backward=student.most(settings.batch) + unpacked,
            trained=sum(times * p.numel() for times, p in trained),
            parameters=parameters,
        )

    def largest_batch(self, settings: Settings, memory: int) -> int:
        """The most queries a micro-batch may hold within `memory` bytes; 0 when not even one fits."""

        def fits(batch: int) -> bool:
            return self.budget(replace(settings, batch=batch)).peak <= memory

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    # -- what is found out once ------------------------------------------------------------------------------------

    def _model(self, dtype: torch.dtype) -> nn.Module:
        """The base model, without weights."""

        def make() -> nn.Module:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self.config, dtype=dtype, trust_remote_code=False)

        return self._once(("model", dtype), make)

    def _standing(self, settings: Settings) -> tuple[int, int, int]:
        """(bytes of the weights, how many parameters, bytes of the largest layer that is unpacked to be multiplied with)."""

        def count() -> tuple[int, int, int]:
            model = self._model(settings.dtype)
            weights, unpacked = sum(_weight_bytes(model, settings.quantization)), 0
            if settings.quantization is not None:
                largest = max(layer.weight.numel() for layer in _quantised(model))
                unpacked = largest * settings.dtype.itemsize
            return weights, sum(p.numel() for p in model.parameters()), unpacked

        return self._once(("standing", settings.dtype, settings.quantization), count)

    def _step(self, settings: Settings, length: int, trains: bool) -> Step:
        adapter, checkpointing = (settings.adapter, settings.checkpointing) if trains else (None, False)
        how = length, settings.autocast, adapter, checkpointing, trains
        key = ("step", settings.dtype, *map(repr, how))
        return self._once(key, lambda: simulate(self._model(settings.dtype), *how))

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._simulated:
            try:
                self._simulated[key] = make()
            except Exception as error:  # whatever the model's own code raises
                name = type(self.config).__name__
                raise ValueError(f"model: {name} cannot be tried out without its weights: {error}") from error
        return self._simulated[key]

    def _prefixes(self, settings: Settings) -> int:
        """Keys and values of the steering prefixes; none where whole prompts are read (`duet.methods.reuse`)."""
        if settings.teacher not in ("adapter off", "copy") or cannot_reuse(self._model(settings.dtype)):
            return 0
        config = self.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        itemsize = 2 if settings.autocast else settings.dtype.itemsize
        token = 2 * config.num_hidden_layers * heads * size * itemsize
        needed = token * settings.subjects * (settings.teacher_length - settings.length)
        return needed if needed <= settings.workspace else 0


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


def optimizer_bytes(optim: str, parameter: Tensor) -> int:
    """Bytes of one parameter's optimizer states, by the optimizer's name in TrainingArguments.

    Raises:
        ValueError: a name that is not known here.

    Example:
        >>> weight = torch.empty(1024, 1024, dtype=torch.bfloat16)
        >>> [optimizer_bytes(name, weight) >> 20 for name in ("adamw_torch", "paged_adamw_8bit", "sgd")]
        [4, 2, 0]
    """
    name = re.sub(r"^paged_|_(torch|fused|bnb|8bit|32bit|hf|xla|npu)", "", str(optim))
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
