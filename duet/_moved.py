"""Import paths of version 0.1.0: they work in 0.2 and say once where their contents are now. In 0.3 this file goes.

from duet.caching import cache_teacher      # DeprecationWarning: duet.caching is now duet.store.build
"""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module -> where its names are now; several modules are asked in turn.
MOVED = {
    "duet.rows": "duet.data.rows",
    "duet.sources": "duet.data.sources",
    "duet.data": "duet.data.dataset",
    "duet.prompts": "duet.data.prompts",
    "duet.lm": "duet.model.lm",
    "duet.teacher": "duet.model.teacher duet.store.teacher",
    "duet.prefix_cache": "duet.model.prefix_cache",
    "duet.checkpoints": "duet.output.checkpoints",
    "duet.run_record": "duet.output.record",
    "duet.model_card": "duet.output.card",
    "duet.counterfactual": "duet.methods.counterfactual",
    "duet.noising": "duet.methods.noising",
    "duet.views": "duet.methods.views",
    "duet.objectives": "duet.methods.objectives",
    "duet.objectives.record": "duet.methods.objectives.record",
    "duet.objectives.distillation": "duet.methods.objectives.distillation",
    "duet.objectives.baselines": "duet.methods.objectives.baselines",
    "duet.objectives.deep": "duet.methods.objectives.deep",
    "duet.caching": "duet.store.build",
    "duet.topk_store": "duet.store.read",
    "duet.topk_writer": "duet.store.write",
    "duet.topk_columns": "duet.store.columns",
    "duet.provenance": "duet.store.provenance duet.model.hashes",
    "duet.run": "duet.run.commands",
    "duet.run_config": "duet.run.config_file",
    "duet.plan": "duet.run.plan",
    "duet.plan_report": "duet.run.plan_report",
    "duet.evaluation.suites": "duet.evaluation.suites.suite",
    "duet.evaluation.asking": "duet.evaluation.suites.asking",
    "duet.evaluation.runner": "duet.evaluation.suites.runner",
    "duet.evaluation.summary": "duet.evaluation.suites.summary",
    "duet.evaluation.row_metrics": "duet.evaluation.suites.row_metrics",
    "duet.evaluation.attacks": "duet.evaluation.attacks.attacks",
    "duet.evaluation.attack_rows": "duet.evaluation.attacks.rows",
    "duet.evaluation.attack_run": "duet.evaluation.attacks.runner",
    "duet.evaluation.distribution": "duet.evaluation.attacks.distribution",
    "duet.evaluation.target": "duet.evaluation.attacks.target",
    "duet.evaluation.weights": "duet.evaluation.attacks.weights",
    "duet.evaluation.report": "duet.evaluation.report.report",
    "duet.evaluation.report_page": "duet.evaluation.report.page",
    "duet.evaluation.report_runs": "duet.evaluation.report.runs",
    "duet.evaluation.report_table": "duet.evaluation.report.tables",
    "duet.evaluation.figures": "duet.evaluation.report.figures",
    "duet.evaluation.topk_change": "duet.evaluation.report.topk",
    "duet.world": "duet.demo",
    "duet.world.attacks": "duet.demo.attacks",
    "duet.world.checkpoint": "duet.demo.checkpoint",
    "duet.world.curriculum": "duet.demo.curriculum",
    "duet.world.demo": "duet.demo.tour",
    "duet.world.facts": "duet.demo.facts",
    "duet.world.methods": "duet.demo.methods",
    "duet.world.plots": "duet.demo.plots",
    "duet.world.pretrain": "duet.demo.pretrain",
    "duet.world.probes": "duet.demo.probes",
    "duet.world.recipes": "duet.demo.recipes",
    "duet.world.report": "duet.demo.report",
    "duet.world.scorecard": "duet.demo.scorecard",
    "duet.world.steering": "duet.demo.steering",
    "duet.world.tokenizer": "duet.demo.tokenizer",
    "duet.world.words": "duet.demo.words",
    "duet.world.workplace": "duet.demo.workplace",
}


def names_of(old: str) -> Callable[[str], Any]:
    """`__getattr__` of a package that has taken the place of the module `old`: it finds what that module held."""

    def getattr_(name: str) -> Any:
        new = MOVED[old]
        if name.startswith("__") or not hasattr(module := import_module(new), name):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        _warn(f"{old}.{name}", f"{new}.{name}")
        return getattr(module, name)

    return getattr_


def _warn(old: str, new: str) -> None:
    text = f"{old} is now {new}; the old path goes in version 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


class _Finder:
    """Finds the old modules; not those whose name a package has now."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        gone = name in MOVED and not MOVED[name].startswith(f"{name}.")
        return ModuleSpec(name, _Finder, is_package=True) if gone else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        old = module.__name__
        _warn(old, " and ".join(MOVED[old].split()))
        now = [import_module(name) for name in MOVED[old].split()]

        def getattr_(name: str) -> Any:
            for each in now:
                if hasattr(each, name):
                    return getattr(each, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        module.__dict__.update(__doc__=now[0].__doc__, __getattr__=getattr_)


def install() -> None:
    """The old paths can be imported from now on."""
    sys.meta_path.insert(0, _Finder)
