"""A model's adapter and dropout, switched off and on again at every step without a walk through its modules.

peft's `disable_adapter()` and `module.eval()` visit every module: 2,700 in an 8B model with LoRA, tens of milliseconds a step.
Here the modules are listed once. At each use the children of every module are compared with the list, so that an adapter that was
added, deleted or merged is noticed; then the flags that the layers read are set, and afterwards set back as they were.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Adapters that are switched off in another way than by a flag in each layer: peft does it.
_WITHOUT_FLAGS = ("ADAPTION_PROMPT", "XLORA")
_ABSENT = object()


class Switches:
    """The switches of one model.

    Args:
        model: any module, with an adapter of peft or without.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)).train()
        >>> layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
        >>> with Switches(adapted).base_model():
        ...     layer.training, layer.disable_adapters
        (False, True)
        >>> layer.training, layer.disable_adapters
        (True, False)
    """

    def __init__(self, model: Any):
        self.model = model
        self._list()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the context dropout is off in every module; afterwards each of them is in the mode in which it was."""
        self._look()
        states, acting = self._states, [module for module in self._acting if module.training]
        before = [state["training"] for state in states]
        try:
            for module in acting:
                module.train(False)
            for state in states:
                state["training"] = False
            yield
        finally:
            for module in acting:
                module.train(True)
            for state, was in zip(states, before, strict=True):
                state["training"] = was

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Within the context dropout and adapters are off: the model computes what its base model does.

        For use without gradients: peft's `disable_adapter()` also stops the adapter's weights from requiring them, this does not.

        Raises:
            ValueError: an adapter is merged into the base model's weights.
        """
        with self.evaluating():
            if any(layer.get("merged_adapters") for layer in self._layers):
                raise ValueError(
                    "model: its adapter is merged into the base model's weights, wanted it beside them: call "
                    "model.unmerge_adapter() first"
                )
            if self._peft_switches:
                with self.model.disable_adapter():
                    yield
            else:
                with (
                    _set([vars(self.model)], "_adapters_disabled", True),
                    _set(self._layers, "_disable_adapters", True),
                ):
                    yield

    def _look(self) -> None:
        """Lists the modules anew when one of them has other children than before."""
        if any(self._leaves) or _children(self._parents) != self._known:
            self._list()

    def _list(self) -> None:
        modules = list(self.model.modules())
        self._leaves = [module._modules for module in modules if not module._modules]
        self._parents = [module._modules for module in modules if module._modules]
        self._known = _children(self._parents)
        self._states = [vars(module) for module in modules if "training" in vars(module)]
        self._acting = [module for module in modules if _acts(module)]
        self._layers: list[dict[str, Any]] = []
        self._peft_switches = False
        if hasattr(self.model, "peft_config"):
            from peft.tuners.tuners_utils import BaseTunerLayer
            from peft.utils.other import AuxiliaryTrainingWrapper

            kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
            self._layers = [vars(module) for module in modules if isinstance(module, kinds)]
            self._peft_switches = any(
                config.is_prompt_learning or getattr(config.peft_type, "value", None) in _WITHOUT_FLAGS
                for config in self.model.peft_config.values()
            )


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """`Switches.evaluating` of a model that is not asked at every step."""
    return Switches(model).evaluating()


def _acts(module: nn.Module) -> bool:
    """Whether a module does more than note it when it is told to train or to stop."""
    if isinstance(module, PreTrainedModel):
        return bool(getattr(module, "use_kernels", False))  # it chooses its kernels anew
    return type(module).train is not nn.Module.train or "training" not in vars(module)


def _children(tables: list[dict[str, nn.Module | None]]) -> list[tuple[nn.Module | None, ...]]:
    return list(map(tuple, map(dict.values, tables)))


@contextmanager
def _set(tables: list[dict[str, Any]], name: str, value: Any) -> Iterator[None]:
    before = [table.get(name, _ABSENT) for table in tables]
    try:
        for table in tables:
            table[name] = value
        yield
    finally:
        for table, was in zip(tables, before, strict=True):
            if was is _ABSENT:
                table.pop(name, None)
            else:
                table[name] = was
