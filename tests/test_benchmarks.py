"""The benchmark suite end to end at a tiny size: what it writes, and that it cannot be fooled."""

import dataclasses
import json
import os
import pathlib
import time

import pytest
import torch

from benchmarks import (
    anchor,
    cpu_goals,
    gather_crossover,
    harness,
    report,
    run,
    targets,
)
from benchmarks.cases import DIVERGENCES, LOSSES, OPS, Case, floor_ms, make_inputs, zipf_ids
from benchmarks.gpu.suite import Sizes
from benchmarks.harness import Floors, Row
from benchmarks.presets import PRESETS
from benchmarks.providers import PROVIDERS, Provider, chosen
from duet_kernels.dispatch import workspace_bytes

CPU = torch.device("cpu")
CASE = Case("topk_distill_loss", n=16, d=8, v=500, k=4, divergence="huber")
HONEST = [p for p in PROVIDERS if (p.name, p.impl) in (("duet_kernels", "chunked"), ("torch", "eager"))]


def measure(*providers: Provider, case: Case = CASE) -> list[Row]:
    return run.benchmark([case], providers, device="cpu", seconds=0.0, passes=["full"])


def eager() -> Provider:
    return next(p for p in HONEST if p.op == CASE.op and p.name == "torch")


def imitation(change, **fields) -> Provider:
    """Plain torch with a change to its loss, under a peer's name."""

    def build(case):
        honest = eager().build(case)
        return lambda x: change(honest(x), x)

    return dataclasses.replace(eager(), name="peer", impl="imitation", build=build, **fields)


# --- what is measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_every_operation_is_measured_and_its_rows_can_be_read_again(op, tmp_path):
    cases = [Case(op, n=16, d=8, v=500, k=4, divergence=d) for d in DIVERGENCES.get(op, ("",))]
    rows = run.benchmark(cases, HONEST, device="cpu", seconds=0.0)
    passes = 2 if op in LOSSES else 1
    assert len(rows) == 2 * len(cases) * passes
    for row in rows:
        assert (row.gate, row.status) == ("green", "ok"), report.line(row)
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
        assert row.rounds >= harness.MIN_ROUNDS
        assert row.floor_ms > 0 and row.error < 1e-4
        assert row.peak_mb is None or row.peak_mb >= 0
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row.to_json() + "\n" for row in rows))
    assert harness.read_rows(path) == rows
    assert json.loads(path.read_text().splitlines()[0])["pass"] == rows[0].which_pass


def test_inputs_have_probability_mass():
    inputs = make_inputs(dataclasses.replace(CASE, n=64, d=32), CPU)
    z = inputs.teacher_hidden @ inputs.teacher_weight.T
    assert 2 < z.std() < 4
    student = (inputs.hidden @ inputs.weight.T).softmax(-1)
    assert torch.corrcoef(torch.stack([z.softmax(-1).flatten(), student.flatten()]))[0, 1] > 0.5
    assert student.gather(-1, inputs.labels[:, None]).mean() > 10 / CASE.v


def test_floors_count_the_products_that_an_exact_result_needs():
    floors = Floors(product_ms=10.0, copy_gb_s=1000.0)
    shape = {"n": 512, "d": 100, "v": 10_000, "k": 10}
    dense = Case("linear_distill_loss", divergence="forward_kl", **shape)
    trained = dataclasses.replace(dense, trainable=True)
    assert [floor_ms(dense, floors, p) for p in ("forward", "full")] == [20, 30]
    assert floor_ms(trained, floors, "full") == 40
    assert floor_ms(Case("linear_cross_entropy", **shape), floors, "full") == 20
    assert floor_ms(Case("linear_topk", **shape), floors, "forward") == 10
    sparse = Case("topk_distill_loss", divergence="huber", **shape)
    gathered = 512 * 10 * 100 * 4 / 1e9  # ms at 1000 GB/s
    assert floor_ms(sparse, floors, "full") == pytest.approx(gathered)
    weight = 10_000 * 100 * 4 / 1e9
    assert floor_ms(dataclasses.replace(sparse, trainable=True), floors, "full") == pytest.approx(
        gathered + weight
    )


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("divergence", ["huber", "forward_kl"])
@pytest.mark.parametrize("impl", ["gather", "gather chunks"])
def test_a_rival_that_makes_only_the_k_logits(impl, divergence, trainable):
    case = Case("topk_distill_loss", n=300, d=512, v=600, k=16, divergence=divergence, trainable=trainable)
    (rival,) = (p for p in chosen([f"torch/{impl}"]) if p.takes(case))
    assert not rival.takes(dataclasses.replace(case, divergence="forward_kl/tail"))
    verdict = run.verdict_of(rival, case, CPU)  # of 300 tokens 128 are gathered at a time
    assert verdict.green and verdict.error < 1e-5, verdict
    inputs = make_inputs(dataclasses.replace(case, n=8), CPU)
    unread = torch.ones(case.v, dtype=torch.bool).index_fill(0, inputs.teacher.indices.flatten(), False)
    assert unread.any()
    with torch.no_grad():
        inputs.weight[unread] = torch.nan
    loss = rival.build(case)(inputs)
    assert loss.isfinite() and torch.autograd.grad(loss, inputs.hidden)[0].isfinite().all()


def test_the_anchor_measures_the_rivals_and_compiles_first_what_is_compiled(monkeypatch):
    names = {p.label for p in anchor.providers_of(quick=False)["others"]}
    assert {"torch gather", "torch gather compile", "torch gather chunks"} <= names
    called = []
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(anchor, "call_of", lambda provider, *_: lambda: called.append(provider.label))
    anchor.compile_cases([CASE], "cpu", quick=True)
    assert {"torch compile", "torch gather compile"} <= set(called) and "torch gather" not in called


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_cases_once_and_leave_no_operation_without_a_provider(name, device):
    cases = PRESETS[name](torch.device(device))
    assert len(cases) == len(set(cases)) > 0
    assert all(any(p.takes(case) for p in chosen(["torch/eager"])) for case in cases)


# --- the gate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda loss, x: (
            loss + 0.2 * (x.hidden.sum() - x.hidden.sum().detach())
        ),  # value right, gradient wrong
        lambda loss, x: loss.detach() + 0 * x.hidden.sum(),  # value right, gradient zero
        lambda loss, x: 1.2 * loss,
        lambda loss, x: loss * torch.nan,
    ],
    ids=["gradient", "zero gradient", "value", "nan"],
)
def test_a_wrong_peer_is_red_and_has_no_speed(change, dtype):
    (row,) = measure(imitation(change), case=dataclasses.replace(CASE, dtype=dtype))
    assert (row.gate, row.ms, row.peak_mb) == ("red", None, None)
    assert row.status.startswith("wrong: ")
    assert "gate red" in report.tables([row])


def test_wrong_at_the_measured_size_only_is_red_too():
    peer = imitation(lambda loss, x: loss * (1.2 if x.hidden.shape[0] == CASE.n else 1.0))
    honest, wrong = measure(eager(), peer)
    assert (honest.gate, wrong.gate, wrong.ms) == ("green", "red", None)
    assert wrong.status.startswith("wrong: at this size the loss is")


def test_ours_is_held_to_the_error_budget_not_to_the_peers_bound():
    def slightly_off(loss, x):
        return loss * (1 + 1e-4)

    peer = imitation(slightly_off)
    assert measure(peer)[0].gate == "green"
    assert measure(dataclasses.replace(peer, name="duet_kernels"))[0].gate == "red"


# --- results that are no measurement ----------------------------------------------------------------------------


def test_absent_is_said():
    missing = dataclasses.replace(eager(), package="no-such-peer", module="no_such_peer")
    elsewhere = dataclasses.replace(eager(), devices=("cuda",))
    for provider, reason in ((missing, "no-such-peer is not installed"), (elsewhere, "runs on cuda only")):
        (row,) = measure(provider)
        assert (row.gate, row.status, row.ms) == ("not run", f"absent: {reason}", None)
        assert reason in report.tables([row])


def test_a_package_that_cannot_be_imported_is_absent():
    def build(case):
        raise ModuleNotFoundError("No module named 'cutlass'")

    (row,) = measure(dataclasses.replace(eager(), build=build))
    assert row.status.startswith("absent: ModuleNotFoundError")


def test_out_of_memory_and_errors_are_results_and_the_others_go_on():
    def fails(error):
        def build(case):
            def call(x):
                if x.hidden.shape[0] == CASE.n:  # the gate's small case passes
                    raise error
                return eager().build(case)(x)

            return call

        return dataclasses.replace(eager(), impl=type(error).__name__, build=build)

    rows = measure(fails(torch.OutOfMemoryError("CUDA out of memory")), fails(ValueError("no")), eager())
    assert [row.status for row in rows] == ["out of memory", "error: ValueError: no", "ok"]
    assert [row.ms is None for row in rows] == [True, True, False]
    assert "out of memory" in report.tables(rows)


def test_a_provider_is_asked_for_by_its_name():
    assert {p.impl for p in chosen(["torch/compile"])} == {"compile"}
    with pytest.raises(ValueError, match="torhc"):
        chosen(["torhc"])


# --- the commands -----------------------------------------------------------------------------------------------


def test_command_line_writes_rows_and_tables_and_compares(tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    sizes = ["--n", "16", "--v", "500", "--d", "8", "--k", "4"]
    command = ["--device", "cpu", "--preset", "quick", "--ops", "topk_distill_loss", *sizes]
    command += ["--providers", "duet_kernels", "torch/eager", "--budget-seconds", "0", "--passes", "full"]
    assert run.main([*command, "--out", str(out)]) == 0
    rows = harness.read_rows(out)
    ran = [row for row in rows if row.ms is not None]
    assert {(row.n, row.d, row.v, row.k) for row in rows} == {(16, 8, 500, 4)}
    assert {row.divergence for row in ran} == set(DIVERGENCES["topk_distill_loss"])
    assert "duet_kernels triton" in out.with_suffix(".md").read_text()
    capsys.readouterr()
    assert run.main(["--compare", str(out), str(out)]) == 0
    assert f"{len(rows)} rows in both" in capsys.readouterr().out
    # What is measured anew replaces its earlier row; the others stay, with their commit.
    earlier = [dataclasses.replace(row, commit="earlier") for row in rows]
    out.write_text("".join(row.to_json() + "\n" for row in earlier))
    command[command.index("torch/eager")] = "torch/gather"
    assert run.main([*command, "--out", str(out), "--keep"]) == 0
    now = harness.read_rows(out)
    commits = {(row.impl, row.divergence): row.commit for row in now if row.ms is not None}
    assert commits.pop(("gather", "huber")) == commits.pop(("chunked", "huber")) != "earlier"
    assert commits["eager", "huber"] == "earlier" and len(now) == len(rows) + 2
    assert "earlier: torch eager" in out.with_suffix(".md").read_text()
    absent = dataclasses.replace(
        ran[0], ms=None, gate="not run", status="absent: not installed", commit="now"
    )
    assert run.merged(ran[:1], [absent]) == ran[:1] and run.merged([], [absent]) == [absent]
    with pytest.raises(SystemExit, match="--keep: wanted --out"):
        run.main([*command, "--keep"])
    out.write_text(dataclasses.replace(earlier[0], device="another").to_json() + "\n")
    with pytest.raises(SystemExit, match="are of another, torch"):
        run.main([*command, "--out", str(out), "--keep"])


def test_cpu_goals_fail_when_a_goal_is_missed():
    measured = {name: (1.0, 1.0) for name in cpu_goals.NAMES}
    text, met = cpu_goals.judged(measured)
    assert not met and "| NO |" in text
    measured = {
        name: (1.0, 1.0) if name in cpu_goals.OURS_NAMES else (100.0, 100.0) for name in cpu_goals.NAMES
    }
    text, met = cpu_goals.judged(measured)
    assert met and "NO" not in text and "100 x faster" in text


def test_cpu_goals_write_their_rows_and_table(tmp_path, monkeypatch, capsys):
    tiny = {"n": 16, "d": 8, "v": 500, "k": 4}
    monkeypatch.setattr(cpu_goals, "LOSS", dataclasses.replace(cpu_goals.LOSS, **tiny))
    monkeypatch.setattr(cpu_goals, "SELECTION", dataclasses.replace(cpu_goals.SELECTION, **tiny))
    monkeypatch.setattr(cpu_goals, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["cpu_goals", "--rounds", "3"])
    assert cpu_goals.main() in (0, 1)  # at this size the goals say nothing
    rows = harness.read_rows(tmp_path / "goals.jsonl")
    assert [row.op for row in rows] == 4 * ["topk_distill_loss"] + 2 * ["linear_topk"]
    assert (tmp_path / "goals.md").read_text().strip() in capsys.readouterr().out


# --- the harness ------------------------------------------------------------------------------------------------


def test_variants_alternate_and_input_sets_rotate():
    calls: list[str] = []
    variants = {
        "a": [lambda: calls.append("a0"), lambda: calls.append("a1")],
        "b": lambda: calls.append("b0"),
    }
    measured = harness.measure(variants, device=CPU, seconds=0.0, min_rounds=3)
    warm_up_and_memory = ["a0", "a0", "b0", "b0"]
    assert calls == [*warm_up_and_memory, "a0", "b0", "a1", "b0", "a0", "b0"]
    assert [len(result.ms) for result in measured.values()] == [3, 3]


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_what_a_call_adds():
    kept = torch.ones(16 << 20)  # 64 MiB that live before the call do not count
    peak = harness.peak_mb(lambda: torch.ones(8 << 20).sum() + kept[0], CPU)
    assert 31 <= peak < 48


def test_each_provider_gets_the_workspace_it_says_and_leaves_none_behind():
    seen = set()

    def note(loss, x):
        seen.add(workspace_bytes() >> 20)
        return loss

    before = workspace_bytes()
    measure(imitation(note, workspace_mb=1024))
    assert 1024 in seen
    assert workspace_bytes() == before


def test_a_red_gate_of_ours_fails_the_command(monkeypatch, capsys):
    wrong = dataclasses.replace(imitation(lambda loss, x: 1.2 * loss), name="duet_kernels")
    monkeypatch.setattr(run, "chosen", lambda names: [wrong])
    command = [
        "--device",
        "cpu",
        "--preset",
        "quick",
        "--ops",
        "topk_distill_loss",
        "--n",
        "16",
        "--v",
        "500",
    ]
    assert run.main(command) == 1
    assert "wrong: " in capsys.readouterr().out


# --- the anchor and its targets ---------------------------------------------------------------------------------


SHAPE = {"n": 8192, "d": 4096, "v": 128256, "k": 64, "dtype": torch.bfloat16}
PLACE = {"commit": "c", "device": "d"}


def anchor_row(figure: targets.Figure, **fields: object) -> Row:
    case = figure.case
    about = {"op": case.op, "divergence": case.divergence, "head": case.head, "ids": case.ids}
    about |= {"n": case.n, "d": case.d, "v": case.v, "k": case.k, "which_pass": case.passes[-1]}
    about |= {"torch": "t", "triton": "t", "gate": "green", "dtype": "bfloat16", "provider": "duet_kernels"}
    return Row(**PLACE, **about, **{"impl": figure.impl, **fields})


def kernel(figure: targets.Figure, name: str, ms: float) -> targets.Kernel:
    op, divergence, ids, head, n, k, impl = figure.key
    about = {"op": op, "divergence": divergence, "ids": ids, "head": head, "n": n, "k": k, "impl": impl}
    return targets.Kernel(**PLACE, **about, kernel=name, calls=4, ms=ms)


def test_each_figure_has_its_unit_and_is_met_or_not():
    wanted = targets.figures(**SHAPE)
    assert len(wanted) == len({(f.key, f.unit, f.kernel) for f in wanted})
    first = {f.unit: f for f in reversed(wanted)}
    assert set(first) == set(targets.UNITS)
    ratio = next(f for f in wanted if f.case.op == "linear_token_stats" and f.unit == "x G")
    rows = [
        anchor_row(ratio, ms=13.0, floor_ms=12.0),
        anchor_row(first["ms"], ms=4.0, floor_ms=2.0),
        anchor_row(first["wall ms"], ms=0.3, floor_ms=0.2, wall_ms=0.4),
        anchor_row(first["x triton"], ms=30.0, floor_ms=12.0),
        anchor_row(dataclasses.replace(first["x triton"], impl="triton"), ms=14.0, floor_ms=12.0),
    ]
    kernels = [
        kernel(first["TB/s"], "_fold_kernel", 0.5),
        kernel(first["TB/s"], "_merge_fold_kernel", 0.5),
        kernel(first["TB/s"], "nvjet", 12.0),
        kernel(first["kernel ms"], "_stream_kernel", 0.7),
    ]
    by_key = {targets.key_of(row): row for row in rows}
    values = {unit: figure.value(by_key, kernels) for unit, figure in first.items() if unit != "x G"}
    moved = 4 * 8192 * 128256 / 1e9  # fp32 logits, read once: 1 ms in two kernels
    assert values == {
        "ms": 4.0, "wall ms": 0.4, "x triton": pytest.approx(30 / 14), "kernel ms": 0.7, "TB/s": pytest.approx(moved)
    }  # fmt: skip
    assert ratio.value(by_key, kernels) == pytest.approx(13 / 12)
    lines, counted = targets.table([ratio, *(first[u] for u in values)], rows, kernels)
    cells = {f"{cells[1]} ({cells[2]})": cells[3] for cells in (line.split(" | ") for line in lines[2:])}
    assert {f.measure for f in wanted if f.unit == "x G"} == {"x G", "x 2 G", "x 3 G", "x 4 G"}
    assert cells["1.08 x G (<= 1.12)"] == "met" and cells["4 ms (<= 3.5)"] == "NOT MET"
    assert cells["4.2 TB/s (>= 3.8)"] == "met" and counted == "5 met, 1 NOT MET, 0 not measured"
    (line,) = targets.table([ratio], [], [])[0][2:]
    assert "not measured" in line
    red = dataclasses.replace(rows[0], ms=None, floor_ms=None, status="wrong: loss")
    assert "not measured (wrong: loss)" in targets.table([ratio], [red], [])[0][2]


def test_the_anchor_writes_rows_kernels_and_its_table_at_toy_size(tmp_path, capfd):
    command = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--only", "linear_token_stats"]
    assert anchor.main([*command, "--parts", "ours", "kernels", "chunked", "--seconds", "600"]) == 0
    said = capfd.readouterr().out
    rows = harness.read_rows(tmp_path / "bench.jsonl")
    impls = {row.impl for row in rows if row.provider == "duet_kernels"}
    assert {"triton", "triton 256 MiB", "triton 1 GiB", "triton 3 GiB", "chunked"} <= impls
    assert len(rows) == len({(row.provider, row.impl) for row in rows})
    assert all(row.gate == "green" for row in rows if row.provider == "duet_kernels"), said
    kernels = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert {x["impl"] for x in kernels} == {"triton", "triton 3 GiB"} and all(x["ms"] >= 0 for x in kernels)
    assert "| `linear_token_stats`, forward, N 16, triton |" in said
    assert said.splitlines()[-1].startswith("figures: ")
    assert (tmp_path / "targets.md").read_text() in said
    # The same tables from the files alone, and no time is no measurement.
    assert anchor.main([*command, "--figures", "--gate", "red"]) == 0
    again = capfd.readouterr().out
    assert again == (tmp_path / "targets.md").read_text() and "correctness gate: NOT GREEN: red" in again
    assert anchor.main([*command, "--seconds", "0"]) == 0
    nothing = capfd.readouterr().out
    assert "no time for" in nothing and "figures: 0 met, 0 NOT MET, 3 not measured" in nothing


def test_a_device_that_no_longer_answers_costs_one_step(tmp_path, monkeypatch, capsys):
    """An illegal access stays in its process: the rest is measured by another one."""
    command = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--only", "huber", "--seconds", "600"]
    command += ["--parts", "chunked", "others"]
    begun = []
    monkeypatch.setattr(anchor.Run, "measure", lambda run, case, part: begun.append((part, str(case))))
    alive = iter([True, False])
    monkeypatch.setattr(harness, "answers", lambda device: next(alive, True))
    replaced = []
    monkeypatch.setattr(os, "execv", lambda path, words: replaced.append(words))
    anchor.main(command)
    (words,) = replaced
    assert words[1:3] == ["-m", "benchmarks.anchor"] and len(begun) == 2
    anchor.main(words[3:])
    assert len(replaced) == 1 and len(begun) == len(set(begun)) == 2 + 4  # chunked of two, others of four
    assert "no longer answers after" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_that_do_not_end_in_time_are_ended(tmp_path):
    write_a, write_b = [(f"open({str(tmp_path / name)!r}, 'w').close()",) for name in "ab"]
    anchor.side_by_side(
        exec, [write_a], seconds=60
    )  # ends when it is done; what takes long to import is there now
    start = time.monotonic()
    anchor.side_by_side(exec, [("import time; time.sleep(60)",), write_b], seconds=4)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert time.monotonic() - start < 44


def test_zipf_ids_are_few_that_stand_everywhere_and_many_that_stand_nowhere():
    n, v, _, k = Sizes().zipf
    ids = zipf_ids(n, v, k, torch.Generator().manual_seed(0))
    assert ids.shape == (n, k) and (ids.sort(1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(ids.flatten(), minlength=v)
    assert counts.max() > 2000 and 0.45 < (counts == 0).float().mean() < 0.75


def test_a_zipf_teacher_is_a_teachers_own_logits():
    case = dataclasses.replace(CASE, n=32, ids="zipf", divergence="forward_kl")
    inputs = make_inputs(case, CPU)
    z = inputs.teacher_hidden @ inputs.teacher_weight.T
    torch.testing.assert_close(z.gather(1, inputs.teacher.indices), inputs.teacher.values)
    torch.testing.assert_close(z.logsumexp(1), inputs.teacher.logsumexp)
    assert (inputs.teacher.values.diff(dim=1) <= 0).all()
    rows = run.benchmark(
        [case, dataclasses.replace(case, ids="likeliest")], HONEST, device="cpu", seconds=0.0
    )
    assert {row.gate for row in rows} == {"green"}
    assert len({report.case_of(row) for row in rows}) == 4 and "Zipf ids" in report.tables(rows)
    with pytest.raises(ValueError, match="ids: wanted one of likeliest, zipf"):
        dataclasses.replace(case, ids="zpif")
    with pytest.raises(ValueError, match="ids: zipf ids hold hardly any probability"):
        dataclasses.replace(case, divergence="forward_kl/tail")


def test_a_call_that_takes_long_is_timed_once():
    calls: list[str] = []

    def slow():
        calls.append("slow")
        time.sleep(0.05)

    measured = harness.measure(
        {"slow": slow, "fast": lambda: calls.append("fast")},
        device=CPU,
        seconds=0.0,
        min_rounds=3,
        slow_seconds=0.04,
    )
    assert calls.count("slow") == 2 and len(measured["slow"].ms) == 1 and measured["slow"].ms[0] >= 50
    assert calls.count("fast") >= 2


def test_an_earlier_result_stays_until_the_new_one_is_whole(tmp_path):
    (out := tmp_path / "rows.jsonl").write_text("earlier")
    with pytest.raises(SystemExit, match="--ops: the preset 'cpu' has no case"):
        run.main(["--device", "cpu", "--ops", "linear_logsumexp", "--out", str(out)])
    with pytest.raises(SystemExit, match="--out: wanted a file for rows of JSON"):
        run.main(["--device", "cpu", "--out", str(tmp_path / "rows.md")])
    with pytest.raises(SystemExit, match=r"--providers: wanted some of .*, got nobody"):
        run.main(["--device", "cpu", "--providers", "nobody", "--out", str(out)])
    with pytest.raises(SystemExit, match=r"--n: wanted numbers of at least 1, got \[-1\]"):
        run.main(["--device", "cpu", "--n", "-1", "--out", str(out)])
    assert out.read_text() == "earlier"


@pytest.mark.parametrize("option", ["--table", "--plots", "--compare"])
def test_a_missing_result_is_named(option, capsys):
    with pytest.raises(SystemExit):
        run.main([option, *["missing.jsonl"] * (1 + (option == "--compare"))])
    assert "there is no file missing.jsonl" in capsys.readouterr().err


def test_the_crossover_of_gathering_is_measured(tmp_path, monkeypatch, capsys):
    for name, size in (("N", 8), ("D", 16), ("V", 64), ("STEP", 4), ("RESULTS", tmp_path)):
        monkeypatch.setattr(gather_crossover, name, size)
    monkeypatch.setattr("sys.argv", ["gather_crossover", "--counts", "2", "--rounds", "1"])
    assert gather_crossover.main() == 0
    assert [
        json.loads(line)["k"] for line in (tmp_path / "gather_crossover.jsonl").read_text().splitlines()
    ] == [2, 2]
    assert "| float32 | 2 | 32 |" in capsys.readouterr().out
