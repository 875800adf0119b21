"""One training step of a model's backbone on tensors without memory: how many bytes it keeps alive, for every batch.

A model is made without weights (on the meta device), and one step of it runs on fake tensors: every operation computes
shapes only, and the bytes of what is alive are counted. So activations are those of the architecture itself rather
than of a formula for it. Two things keep this fast:

* One run serves every batch. It is made with R = 1,000,003 rows, a prime: a tensor whose bytes R divides grows with the batch, any
  other does not. What is alive is a line in the batch, and a peak the largest of some lines.
* A model of many equal layers is not run whole. Its decoder layers are sorted by kind (class, shapes of the weights, what the
  configuration lists for it). One run has two layers of each kind (the first keeps less than the others: its input is the
  embedding, which is kept anyway), and for each kind one more run has a third: what that adds is added for all others. In each
  phase of a step (forward; backward of the top layer; backward of those below it) memory is linear in the number of layers.
"""

import copy
import re
import weakref
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.lm import find_backbone, layers_path

ROWS = 1_000_003
# Options of peft.LoraConfig that tell layers apart by their number.
_BY_NUMBER = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
_FEW, _MOST_KINDS = 2, 4
PHASES = ("forward", "top", "below")


class Bytes:
    """The largest of some lines `fixed + per_row * batch`."""

    def __init__(self, lines: Sequence[tuple[int, int]] = ()):
        self.lines = list(lines)

    def include(self, fixed: int, per_row: int) -> None:
        if not any(fixed <= f and per_row <= p for f, p in self.lines):
            self.lines = [(f, p) for f, p in self.lines if not (f <= fixed and p <= per_row)]
            self.lines.append((fixed, per_row))

    def at(self, batch: int) -> int:
        return max((fixed + per_row * batch for fixed, per_row in self.lines), default=0)


@dataclass(frozen=True)
class Run:
    """What one simulated step kept alive: after the forward, and at most in each phase."""

    kept: Bytes
    most: dict[str, Bytes]


@dataclass(frozen=True)
class Step:
    """Bytes of a step, by the batch: a run with a few layers of each kind, and runs that have one more of some kind.

    Attributes:
        base: the run with a few.
        more: for each kind that the model has more of: how many more, and the run with one of them.
    """

    base: Run
    more: list[tuple[int, Run]]

    def kept(self, batch: int) -> int:
        """After the forward."""
        return self._whole(batch, lambda run: run.kept)

    def most(self, batch: int) -> int:
        """At the peak of forward and (where there are gradients) backward."""
        return max(self._whole(batch, lambda run, phase=phase: run.most[phase]) for phase in PHASES)

    def _whole(self, batch: int, part: Any) -> int:
        one = part(self.base).at(batch)
        return one + sum(times * (part(run).at(batch) - one) for times, run in self.more)


def simulate(
    model: nn.Module,
    length: int,
    autocast: bool,
    adapter: dict[str, Any] | None,
    checkpointing: bool,
    trains: bool,
) -> Step:
    """One step of `model`, which is on the meta device.

    Args:
        length: tokens of a sequence.
        autocast: whether the backbone runs in bf16 although the weights do not.
        adapter: fields of peft.LoraConfig; None: every weight is trained.
        checkpointing: whether activations are recomputed in the backward.
        trains: whether there is a backward at all.
    """

    def run(numbers: Sequence[int] | None) -> Run:
        part = _copy(model, numbers, adapter)
        return _run(part.train(trains), _layers(part, model), length, autocast, checkpointing and trains)

    if kinds := _kinds(model, adapter):
        some = [number for numbers in kinds for number in numbers[:_FEW]]
        larger = [numbers for numbers in kinds if len(numbers) > _FEW]
        # Whatever the model's own code makes of fewer layers than its configuration says.
        with suppress(Exception):
            base = run(some)
            return Step(base, [(len(each) - _FEW, run([*some, each[_FEW]])) for each in larger])
    return Step(run(None), [])


def trained_parameters(model: nn.Module, adapter: dict[str, Any] | None) -> list[tuple[int, Tensor]]:
    """The parameters that are trained, each with how many like it the model has: of equal layers, one is there."""
    kinds = [] if adapter is None else _kinds(model, adapter)
    part = _copy(model, [numbers[0] for numbers in kinds] if kinds else None, adapter)
    times: dict[int, int] = {}
    if kinds:
        for numbers, layer in zip(kinds, _layers(part, model), strict=True):
            times |= {id(parameter): len(numbers) for parameter in layer.parameters()}
    return [(times.get(id(p), 1), p) for p in part.parameters() if p.requires_grad]


def _kinds(model: nn.Module, adapter: dict[str, Any] | None) -> list[list[int]]:
    """The numbers of the decoder layers, those of one kind together, in the order of the first of each.

    Empty where a part of the layers cannot stand for all: they are too different, or the adapter tells them apart by number.
    """
    targets = (adapter or {}).get("target_modules") or ()
    names = [targets] if isinstance(targets, str) else list(targets)
    numbered = any((adapter or {}).get(name) for name in _BY_NUMBER) or any(
        re.search(r"(?<!\w)\d", name) for name in names
    )
    kinds: dict[Any, list[int]] = {}
    for number, layer in enumerate(_layers(model, model)):
        shapes = tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters())
        listed = repr([each[number] for each in _listed(model).values()])
        kinds.setdefault((type(layer), shapes, listed), []).append(number)
    return [] if numbered or len(kinds) > _MOST_KINDS else list(kinds.values())


def _layers(part: nn.Module, model: nn.Module) -> Any:
    """The decoder layers of `part`, which is `model` or a copy of it with fewer of them; empty where they are not in a list."""
    try:
        path = layers_path(find_backbone(model))
    except TypeError:
        return ()
    return find_backbone(part).get_submodule(path)


def _copy(model: Any, numbers: Sequence[int] | None, adapter: dict[str, Any] | None) -> Any:
    """A copy of `model`, with these of its decoder layers (None: all), and with an adapter that has no weights either."""
    if numbers is None:
        part = copy.deepcopy(model)
    else:
        numbers, layers = sorted(numbers), _layers(model, model)
        every = list(layers)
        del layers[:]
        layers.extend(every[number] for number in numbers)
        try:
            part = copy.deepcopy(model)
        finally:
            del layers[:]
            layers.extend(every)
        for name, each in _listed(model).items():
            setattr(part.config.get_text_config(), name, [each[number] for number in numbers])
    if adapter is None:
        return part
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        return get_peft_model(part, LoraConfig(**adapter))


def _listed(model: Any) -> dict[str, Sequence[Any]]:
    """What the configuration lists layer by layer, such as `layer_types`."""
    config = model.config.get_text_config()
    lists = ((name, value) for name, value in vars(config).items() if isinstance(value, (list, tuple)))
    return {name: value for name, value in lists if len(value) == config.num_hidden_layers}


# -- one run -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, as lines in the batch, and the largest of them in each phase.

    Tensors of `standing` are not counted. A storage counts once, however many views it has.
    """

    def __init__(self, standing: nn.Module):
        super().__init__()
        self.fixed = self.per_row = 0
        self.phase, self.most = PHASES[0], {phase: Bytes() for phase in PHASES}
        self._seen: weakref.WeakSet = weakref.WeakSet()
        for tensor in (*standing.parameters(), *standing.buffers()):
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.most[phase].include(self.fixed, self.per_row)

    def _count(self, storage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            line = (size, 0) if size % ROWS else (0, size // ROWS)
            self._add(1, *line)
            self.most[self.phase].include(self.fixed, self.per_row)
            weakref.finalize(storage, self._add, -1, *line)

    def _add(self, sign: int, fixed: int, per_row: int) -> None:
        self.fixed += sign * fixed
        self.per_row += sign * per_row


def _run(model: Any, layers: Sequence[nn.Module], length: int, autocast: bool, checkpointing: bool) -> Run:
    """One step of a model of its own; one that does not train makes none but the forward."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(model)
        if checkpointing:  # under the name that this version of transformers has for it
            newer = hasattr(model, "activation_checkpointing_enable")
            getattr(model, f"{'activation' if newer else 'gradient'}_checkpointing_enable")()
        live = LiveBytes(model)

        def watch(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: live.begin("below"))

        for layer in layers[-1:]:
            layer.register_forward_pre_hook(watch, with_kwargs=True)
        with live:
            ids = torch.zeros(ROWS, length, dtype=torch.int64)
            mask = torch.ones(ROWS, length, dtype=torch.int64)
            with (
                torch.set_grad_enabled(model.training),
                torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
            ):
                output = find_backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)
            scored = output.last_hidden_state[:, -1]
            del output
            kept = Bytes([(live.fixed, live.per_row)])
            live.begin("top")
            if scored.requires_grad:  # through the head, whose gradient is dense where it is trained
                model.get_output_embeddings()(scored).sum().backward()
    return Run(kept, live.most)


def _materialise(model: nn.Module) -> None:
    """Parameters and buffers on the meta device become (fake) ones of a CPU; shared ones stay shared."""
    made: dict[Tensor, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if tensor not in made:
                    fake = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                table[name] = made[tensor]
