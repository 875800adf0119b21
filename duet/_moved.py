"""Import paths of version 0.1.0: they work in 0.2 and say once where their contents are now. In 0.3 this file goes.

What was not public may be gone: such a name is an AttributeError.

from duet.caching import cache_teacher      # DeprecationWarning: duet.caching is now duet.store.build
"""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# New room -> the old modules that are in it now, as `old` or `old=new`.
_ROOMS = {
    "data": "rows sources prompts data=dataset",
    "model": "lm teacher prefix_cache",
    "output": "checkpoints run_record=record model_card=card",
    "methods": "counterfactual noising views objectives",
    "methods.objectives": "objectives.record objectives.distillation objectives.baselines objectives.deep",
    "store": "caching=build topk_store=read topk_writer=write topk_columns=columns provenance",
    "run": "run=commands run_config=config_file plan plan_report",
    "evaluation.suites": "evaluation.suites=suite evaluation.asking evaluation.runner evaluation.summary "
    "evaluation.row_metrics",
    "evaluation.attacks": "evaluation.attacks evaluation.attack_rows=rows evaluation.attack_run=runner "
    "evaluation.distribution evaluation.target evaluation.weights",
    "evaluation.report": "evaluation.report evaluation.report_page=page evaluation.report_runs=runs "
    "evaluation.report_table=tables evaluation.figures evaluation.topk_change=topk",
    "demo": "world.attacks=probes world.checkpoint world.curriculum world.demo=tour world.facts world.methods world.plots "
    "world.pretrain world.probes world.recipes=methods world.report world.scorecard world.steering world.tokenizer "
    "world.words world.workplace",
}
# Old module -> where its names are now; several modules are looked at in turn.
MOVED = {"duet.world": "duet.demo"} | {
    f"duet.{old}": f"duet.{room}.{new or old.rpartition('.')[2]}"
    for room, modules in _ROOMS.items()
    for old, _, new in (module.partition("=") for module in modules.split())
}
MOVED["duet.teacher"] += " duet.store.teacher"
MOVED["duet.lm"] += " duet.model.loading duet.model.answers"
MOVED["duet.provenance"] += " duet.model.hashes duet.model.weights"


def names_of(old: str, warned: bool = False) -> Callable[[str], Any]:
    """`__getattr__` of what stands in the place of the module `old`: it finds what that module held, and says where.

    Args:
        old: name of the old module; a package may have that name now.
        warned: whether the user knows already.
    """

    def getattr_(name: str) -> Any:
        for new in MOVED[old].split() if not name.startswith("__") else ():
            if hasattr(module := import_module(new), name):
                found = getattr(module, name)
                # A module of the package itself, which `new` imports, is where it says.
                own = isinstance(found, ModuleType) and found.__name__ == f"{old}.{name}"
                if not (warned or own):
                    _warn(f"{old}.{name}", f"{new}.{name}")
                return found
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return getattr_


def _warn(old: str, new: str) -> None:
    text = f"{old} is now {new}; the old path goes in version 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


class _Finder(MetaPathFinder, Loader):
    """Finds the old modules; not those whose name a package has now."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        gone = fullname in MOVED and not MOVED[fullname].startswith(f"{fullname}.")
        return ModuleSpec(fullname, self, is_package=True) if gone else None

    def exec_module(self, module: ModuleType) -> None:
        _warn(module.__name__, " and ".join(MOVED[module.__name__].split()))
        vars(module)["__getattr__"] = names_of(module.__name__, warned=True)


def install() -> None:
    """The old paths can be imported from now on."""
    sys.meta_path.insert(0, _Finder())
