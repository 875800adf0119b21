"""Wrong uses that a type checker must flag: every line that ends in `# wrong`, and no other. Never run.

`make check` runs pyright over this file (`.ci/check_types.py`).
"""

# pyright: basic
# ruff: noqa

from duet import OBJECTIVES, DuetConfig, DuetTrainer, Objective
from duet import DuetConfg  # wrong
from duet.data.sources import DataSource
from duet.evaluation import metrics
from duet.evaluation.attacks.runner import run_attacks
from duet.evaluation.attacks.target import AttackOptions, Target
from duet.evaluation.suites.suite import load_suite
from duet.run.config_file import ModelSection
from duet.store.build import cache_teacher
from duet.store.read import TopKStore

# -- options of a run

good = DuetConfig(
    output_dir="out", objective="npo", k=8, positions="answer", steering_prefixes=["forget {subject}"]
)
DuetConfig(output_dir="out", positions="last")  # wrong
DuetConfig(output_dir="out", answer_source="student")  # wrong
DuetConfig(output_dir="out", reverse_prompt_role="assistant")  # wrong
DuetConfig(output_dir="out", retain_subjects="random")  # wrong
DuetConfig(output_dir="out", normalization="softmax")  # wrong
DuetConfig(output_dir="out", k="32")  # wrong
DuetConfig(output_dir="out", kk=32)  # wrong
DuetConfig(output_dir="out", steering_prefixes={"prefix": 1})  # wrong
ModelSection(name="org/model", dtype="half")  # wrong
ModelSection(name="org/model", quantization="nf5")  # wrong
DataSource(file="rows.jsonl")  # wrong

# -- training and caching

DuetTrainer(model="org/model", args=good, forget_dataset=[{"question": "Who?"}])
DuetTrainer(model="org/model", forget_dataset=[{"question": "Who?"}])  # wrong
DuetTrainer(model="org/model", args={"k": 8}, forget_dataset=[{"question": "Who?"}])  # wrong
DuetTrainer(model="org/model", args=good, forget_dataset=[], teacher_store=3)  # wrong
cache_teacher("org/model", good)  # wrong
TopKStore(folder=None)  # wrong

# -- objectives

OBJECTIVES["mine"] = Objective(lambda step: {"loss": step.hidden.sum()}, raw_logits=True)
OBJECTIVES["mine"] = lambda step: {"loss": step.hidden.sum()}  # wrong
Objective("duet")  # wrong
Objective(None, teacher_sees="nothing")  # wrong

# -- evaluation

load_suite("tofu", {"split": "forget05"})
load_suite(3)  # wrong
metrics.rouge_l("said", "reference", "recall", True)  # wrong
AttackOptions(threshold="0.5")  # wrong
AttackOptions(relearn_rates=1e-3)  # wrong


def attack(target: Target) -> None:
    run_attacks(target, out="out")
    run_attacks(target)  # wrong
