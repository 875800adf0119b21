"""duet.run.plan against what training really allocates: the peak of whole runs on a CPU, counted by the allocator."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from sweeps import case
from tiny_models import forget_rows, retain_rows, tiny, word_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config
from typer.testing import CliRunner

from duet import DuetConfig, DuetTrainer
from duet.cli import app
from duet.run import simulation
from duet.run.plan import Planner, Settings, optimizer_bytes
from duet.run.plan_report import Plan, parse_size
from duet_kernels.dispatch import share_of

COMMON = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
LORA = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SENTENCE = "you know nothing about {subject} and nothing about france or spain . "


def measured_peak(run) -> int:
    """Most bytes that the CPU allocator had given out during `run()`, beyond those given out before."""
    gc.collect()  # an older model that is freed in the meantime would count as less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def widths(trainer) -> tuple[int, int]:
    items = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    return max(len(item["student"]) for item in items), max(len(item["teacher"]) for item in items)


def trained(config, tmp_path, dtype=torch.float32, adapter=None, **options):
    args = DuetConfig(
        output_dir=str(tmp_path / "out"),
        k=8,
        max_steps=2,  # the second has the optimizer's states from the beginning
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        steering_prefixes=[SENTENCE * 6],
        **options,
    )
    forget = [
        {**row, "question": f"{SENTENCE.format(subject='france') * 5} {row['question']}"}
        for row in forget_rows(6)
    ]
    made = []

    def run():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        peft_config = None if adapter is None else LoraConfig(**adapter)
        tokenizer = word_tokenizer()
        made.append(DuetTrainer(model, args, forget, retain_rows(6), tokenizer, peft_config=peft_config))
        made[0].train()

    return measured_peak(run), made[0]


CASES = {
    "llama, adapter": (LlamaConfig(**COMMON), {"adapter": LORA, "per_device_train_batch_size": 6}),
    "qwen3, all weights": (Qwen3Config(**COMMON), {"per_device_train_batch_size": 4}),
    "gemma3, adapter, checkpointing, bf16": (
        Gemma3TextConfig(**COMMON, sliding_window=64),
        {
            "adapter": LORA,
            "dtype": torch.bfloat16,
            "per_device_train_batch_size": 6,
            "activation_checkpointing": True,
        },
    ),
}


@pytest.mark.parametrize("name", [case(name, slow="adapter" in name) for name in CASES])
def test_the_plan_is_within_15_percent_of_the_measured_peak(name, tmp_path):
    config, options = CASES[name]
    measured, trainer = trained(config, tmp_path, **options)
    student, teacher = widths(trainer)
    settings = Settings(
        batch=options["per_device_train_batch_size"],
        length=student,
        teacher_length=teacher,
        dtype=options.get("dtype", torch.float32),
        adapter=options.get("adapter"),
        checkpointing=options.get("activation_checkpointing", False),
        teacher="adapter off" if "adapter" in options else "copy",
    )
    budget = Planner(config).budget(settings)
    assert budget.peak == pytest.approx(measured, rel=0.15)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path):
    """A model's config, and nothing else: a plan reads no weights. One layer is simulated in one run."""
    LlamaConfig(**COMMON | {"num_hidden_layers": 1}, dtype="bfloat16").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(scope="module")
def simulated():
    return {}


@pytest.fixture(autouse=True)
def simulations_are_kept(simulated, monkeypatch):
    """From test to test, as a planner keeps them from budget to budget: they follow from the configuration alone."""

    def begin(planner, config):
        planner.config, planner._simulated = config, simulated.setdefault(config.to_json_string(), {})

    monkeypatch.setattr(Planner, "__init__", begin)


def test_the_command_line_prints_where_the_memory_goes(folder):
    # Of one layer checkpointing saves nothing.
    LlamaConfig(**COMMON | {"num_hidden_layers": 2}, dtype="bfloat16").save_pretrained(folder)
    words = ["plan", "--model", folder, "--adapter.r", "4", "--gpu-memory", "256MiB", "--reserve", "16MiB"]
    text = run(*words)
    for part in (
        "weights (bfloat16)",
        "adapter",
        "optimizer states",
        "the teacher's weights (adapter off)",
        "the peak",
    ):
        assert part in text
    found = json.loads(run(*words, "--json", "--per_device_train_batch_size", "3"))
    assert found["settings"]["batch"] == 3 and found["settings"]["autocast"] and found["fits"]
    sizes = found["bytes"]
    above = max(sizes["teacher_forward"], sizes["activations"] + sizes["loss"], sizes["backward"])
    assert sizes["peak"] == sizes["standing"] + above
    peaks = {(row["trained"], row["base"], row["checkpointing"]): row for row in found["fitting"]}
    off, on = (peaks["LoRA r=4", "bfloat16", checkpointing] for checkpointing in (False, True))
    assert on["largest_batch"] > off["largest_batch"] > 0
    assert peaks["LoRA r=4", "nf4", True]["peak_at_1"] < on["peak_at_1"]
    small = json.loads(run(*words[:5], "--gpu-memory", "1MiB", "--reserve", "0MiB", "--json"))
    assert not small["fits"] and all(row["largest_batch"] == 0 for row in small["fitting"])


@pytest.mark.parametrize("memory", [24 << 20, 24 << 30])
def test_the_largest_batch_is_the_largest_that_fits(memory, monkeypatch):
    """Found by halving: 44,000 rows of a small model are not tried one after the other."""
    planner = Planner(LlamaConfig(**COMMON | {"num_hidden_layers": 1}))
    settings = Settings(adapter=LORA, teacher="adapter off", length=64, teacher_length=128)
    asked, budget = [], Planner.budget
    monkeypatch.setattr(Planner, "budget", lambda self, s: asked.append(s.batch) or budget(self, s))
    batch = planner.largest_batch(settings, memory)
    assert len(asked) < 40 and (memory < 1 << 30 or batch > 10_000)
    peaks = [planner.budget(replace(settings, batch=b)).peak for b in (batch, batch + 1)]
    assert peaks[0] <= memory < peaks[1]
    assert planner.largest_batch(settings, 1 << 20) == 0


# -- against a GPU -----------------------------------------------------------------------------------------------------

SHAPE_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LORA_16 = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Peaks that torch's allocator counted in DuetTrainer.train(), in GiB: one NVIDIA H200, torch 2.11.0+cu130, transformers 5.17.0,
# bf16 weights and autocast, queries of 512 tokens (511 where answers are read) behind a prefix of 128; commit 8576f91.
ON_AN_H200 = {
    "first position, live teacher, checkpointing": ({}, 17.807),
    "the same, batch 16": ({"batch": 16}, 20.12),
    "the same, without checkpointing": ({"checkpointing": False}, 42.660),
    "answers of 256 tokens, live teacher": ({"length": 511, "scored": 256}, 17.805),
    "answers of 256 tokens, cached teacher": ({"length": 511, "scored": 256, "teacher": "cache"}, 17.807),
}
# The same, above what stands, in the first of these runs.
PHASES = {"teacher_forward": 0.569, "activations": 1.065, "backward": 2.318}


@pytest.fixture(scope="module")
def planner_8b():
    return Planner(LlamaConfig(**SHAPE_8B))


@pytest.mark.parametrize("case", ON_AN_H200)
def test_the_plan_is_within_5_percent_of_what_an_8b_model_took_on_a_gpu(case, planner_8b):
    options, measured = ON_AN_H200[case]
    common = {"adapter": LORA_16, "autocast": True, "length": 512, "checkpointing": True}
    settings = Settings(**common | {"teacher": "adapter off"} | options)
    settings = replace(settings, teacher_length=settings.length + 128)
    budget = planner_8b.budget(settings)
    assert budget.peak / 2**30 == pytest.approx(measured, rel=0.05)
    assert budget.standing / 2**30 == pytest.approx(15.489, rel=0.01)
    if not options:
        for name, above in PHASES.items():
            assert getattr(budget, name) / 2**30 == pytest.approx(above, rel=0.05), name


@pytest.mark.slow
def test_a_plan_of_many_layers_tries_few(tmp_path, monkeypatch):
    tried, run = [], simulation._run
    monkeypatch.setattr(simulation, "_run", lambda *args: tried.append(len(args[1])) or run(*args))
    LlamaConfig(**COMMON | {"num_hidden_layers": 80}, dtype="bfloat16").save_pretrained(tmp_path)
    tree = {"model": str(tmp_path), "adapter": {}, "data": {"forget": "x"}}
    plan = Plan.of(tree, 1 << 30, length=64, prefix_length=16, scored=1, reserve=0)
    assert len(plan.fitting) == 10 and set(tried) == {2, 3} and len(tried) == 10


def test_the_workspace_is_a_share_of_the_gpu(folder):
    tree = {"model": folder, "data": {"forget": "x"}, "training": {}}
    for gpu, mib in ((8, 256), (24, 768), (40, 1280), (80, 2304), (512, 2304)):
        assert share_of(gpu << 30) == mib << 20
    plan = Plan.of(tree, 80 << 30, length=32, prefix_length=8, scored=32, reserve=0)
    assert plan.settings.workspace == 2304 << 20
    few = plan.budget.loss
    assert few == 3 * 4 * 8 * 32 * 2048, "less than the workspace: what the logits of all positions take"
    tree["training"]["workspace_bytes"] = 1 << 20
    plan = Plan.of(tree, 24 << 30, length=32, prefix_length=8, scored=32, reserve=0)
    assert plan.budget.loss == plan.settings.workspace == 1 << 20


def test_the_prefixes_that_a_live_teacher_keeps_are_counted(folder):
    common = ["plan", "--model", folder, "--json", "--prefix-length", "50"]
    sizes = json.loads(run(*common, "--subjects", "7"))["bytes"]
    assert sizes["prefixes"] == 7 * 50 * 2 * 2 * 32 * 2, "keys and values, two heads of 32, in bf16"
    without = json.loads(run(*common, "--teacher_store", "x"))["bytes"]
    assert without["prefixes"] == 0 and without["standing"] == sizes["standing"] - sizes["prefixes"]
    many = json.loads(run(*common, "--subjects", "1000000"))["bytes"]
    assert many["prefixes"] == 0, "more than the workspace: then whole prompts are read"
    sliding = Planner(tiny("gemma3").config)
    assert sliding.budget(Settings(adapter=LORA, teacher="adapter off", subjects=9)).prefixes == 0


def planned(folder, **training):
    tree = {"model": folder, "data": {"forget": "x"}, "training": training}
    return Plan.of(tree, 24 << 30, length=32, prefix_length=8, scored=4, reserve=0)


@pytest.mark.parametrize(
    ("options", "scored"),
    [
        ({"objective": "duet"}, 1),
        ({"objective": "duet", "positions": "first_n"}, 4),
        ({"objective": "duet", "positions": "answer", "max_answer_tokens": 9}, 9),
        ({"objective": "duet", "positions": "answer", "answer_source": "dataset"}, 32),
        ({"objective": "duet_deep", "max_answer_tokens": 9}, 9),
        ({"objective": "npo", "max_answer_tokens": 9}, 32),
        ({"objective": "npo", "positions": "first"}, 1),
        ({"objective": "rmu"}, 32),
    ],
)
def test_whole_answers_are_planned_where_the_method_scores_them(folder, options, scored):
    tree = {"model": folder, "data": {"forget": "x"}, "training": options}
    plan = Plan.of(tree, 24 << 30, length=32, prefix_length=8, scored=None, reserve=0)
    assert plan.settings.scored == scored and planned(folder, **options).settings.scored == 4
    words = [f"--{key}={value}" for key, value in options.items()]
    made = json.loads(run("plan", "--model", folder, "--json", "--length", "32", *words))
    assert made["settings"]["scored"] == scored


@pytest.mark.parametrize(
    "options", [{"reuse_prefix": False}, {"objective": "npo", "prefills": ["yes"]}, {"objective": "rmu"}]
)
def test_prefixes_that_nobody_keeps_are_not_counted(folder, options):
    assert planned(folder, steering_prefixes=["forget"]).budget.prefixes > 0
    plan = planned(folder, steering_prefixes=["forget"], **options)
    assert plan.budget.prefixes == 0
    assert plan.settings.teacher_length == (40 if "reuse_prefix" in options else 32)


def test_the_two_numbers_of_a_sharpness_aware_step_are_counted(folder):
    sharp, plain = planned(folder, objective="npo_sam").budget, planned(folder, objective="npo").budget
    assert sharp.optimizer == plain.optimizer + 2 * plain.gradients and sharp.peak > plain.peak


def test_a_model_without_a_configuration_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model: no configuration of '.*' could be read"):
        Plan.of({"model": str(tmp_path), "data": {"forget": "x"}}, 24 << 30, 32, 8, 1, 0)


def test_a_folder_with_an_adapter_is_planned_as_its_base(folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": folder}))
    (tmp_path / "adapter_model.safetensors").touch()
    plans = [
        Plan.of({"model": name, "adapter": {}, "data": {"forget": "x"}}, 24 << 30, 32, 8, 1, 0)
        for name in (folder, str(tmp_path))
    ]
    assert plans[0].budget == plans[1].budget


def test_a_size_without_a_unit_is_in_gib(folder):
    found = json.loads(run("plan", "--model", folder, "--gpu-memory", "24", "--reserve", "1", "--json"))
    assert found["gpu_memory"] == 24 << 30 and found["reserve"] == 1 << 30
    assert parse_size("24GB") == parse_size("24gib") == parse_size(" 24 G ") == 24 << 30
    for text in ("", "GiB", "24 x", "24B", "-1", "24 GiB free", "9" * 400):
        with pytest.raises(ValueError, match="reserve: wanted a size such as 24GiB"):
            parse_size(text, "reserve")


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_both_names_of_checkpointing_are_planned(folder, name):
    found = json.loads(run("plan", "--model", folder, "--json", f"--{name}", "true"))
    assert found["settings"]["checkpointing"]


def test_a_plan_of_a_config_file(folder, tmp_path):
    (tmp_path / "x.yaml").write_text(
        f"model: {{name: {folder}, dtype: float32}}\ndata: {{forget: never-read.jsonl}}\n"
        "training: {bf16: true, activation_checkpointing: true, optim: sgd, objective: ga}\n"
    )
    found = json.loads(run("plan", "--config", str(tmp_path / "x.yaml"), "--json", "--gpu-memory", "1GiB"))
    settings = found["settings"]
    assert settings["dtype"] == "float32" and settings["autocast"] and settings["checkpointing"]
    assert settings["teacher"] == "none" and settings["adapter"] is None and found["bytes"]["optimizer"] == 0
    assert found["bytes"]["weights"] == pytest.approx(4 * found["bytes"]["parameters"], rel=1e-3)


def test_another_model_is_planned_as_it_would_be_trained(tmp_path, monkeypatch):
    """The revision is the model's in the file."""
    (tmp_path / "x.yaml").write_text("model: {name: a, dtype: float32, revision: v1}")
    trees = []
    monkeypatch.setattr(Plan, "of", lambda tree, *_: trees.append(tree))
    CliRunner().invoke(app, ["plan", "--config", str(tmp_path / "x.yaml"), "--model", "b"])
    assert trees == [{"model": {"name": "b", "dtype": "float32"}}]


@pytest.mark.parametrize(
    ("options", "teacher", "copies"),
    [
        ({"objective": "npo"}, "before training", 0),
        ({"objective": "npo", "prefills": ["yes"]}, "copy", 1),
        ({"objective": "duet"}, "copy", 1),
    ],
)
def test_a_plan_knows_which_methods_keep_a_second_model(folder, options, teacher, copies):
    tree = {"model": folder, "data": {"forget": "x"}, "training": options}
    plan = Plan.of(tree, 1 << 30, length=32, prefix_length=8, scored=4, reserve=0)
    assert plan.settings.teacher == teacher
    assert plan.budget.teacher_weights == copies * plan.budget.weights
    assert {row["trained"] for row in plan.fitting if "all weights" in row["trained"]} == (
        {"all weights, teacher a copy", "all weights, teacher from a cache"}
        if copies
        else {"all weights, teacher asked before training"}
    )


def test_optimizer_states_are_those_of_torch():
    weight = torch.nn.Parameter(torch.zeros(300, 70))
    for name, make in {
        "adamw_torch": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }.items():
        optimizer = make([weight], lr=0.1)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        states = [t for t in optimizer.state[weight].values() if torch.is_tensor(t) and t.dim()]
        assert optimizer_bytes(name, weight) == sum(t.numel() * t.element_size() for t in states), name


@pytest.mark.parametrize(
    "words, message",
    [
        (["--optim", "lomo"], "optim: wanted adafactor or one of adamw"),
        (["--gpu-memory", "24x"], "gpu-memory: wanted a size such as 24GiB"),
        (["--training.k", "0"], "k: wanted an integer >= 1"),
        (["--modle", "x"], "there is no such option .did you mean 'model'"),
        (["--lenght", "9"], "there is no such option .did you mean 'length'"),
    ],
)
def test_bad_plans(folder, words, message):
    with pytest.raises(ValueError, match=message):
        run("plan", "--model", folder, *words)
    with pytest.raises(ValueError, match="plan: wanted --model or --config, got neither"):
        run("plan")


@pytest.mark.parametrize("architecture", ["gemma2", "neox", "phi", "phi3"])
def test_other_architectures_can_be_planned(architecture):
    settings = Settings(adapter=LORA, teacher="adapter off", length=32, teacher_length=48, batch=3)
    bare = tiny(architecture, num_hidden_layers=1).bfloat16()
    budget = Planner(bare.config).budget(settings)
    assert budget.parameters == sum(p.numel() for p in bare.parameters())
    assert budget.peak > budget.standing > budget.weights > 2 * budget.parameters - 1
