"""The benchmark suite end to end at a tiny size: what it writes, and that it cannot be fooled."""

import dataclasses
import json
import pathlib

import pytest
import torch

from benchmarks import cpu_goals, harness, plots, readme, report, run
from benchmarks.cases import DIVERGENCES, OPS, Case, floor_ms, make_inputs
from benchmarks.harness import Floors, Row
from benchmarks.presets import PRESETS
from benchmarks.providers import PROVIDERS, Provider, chosen
from duet_kernels.workspace import workspace_bytes

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
    passes = 2 if op in DIVERGENCES or op == "linear_cross_entropy" else 1
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
    assert floor_ms(sparse, floors, "full") == pytest.approx(2 * gathered)
    weight = 10_000 * 100 * 4 / 1e9
    assert floor_ms(dataclasses.replace(sparse, trainable=True), floors, "full") == pytest.approx(
        2 * gathered + weight
    )


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


# --- tables, comparison, figures --------------------------------------------------------------------------------


def fake(provider: str, impl: str, ms: float, peak_mb: float, **sizes: int) -> Row:
    where = {"commit": "c", "device": "d", "torch": "t", "triton": "t", "gate": "green"}
    shape = {"n": 16, "d": 8, "v": 500, "k": 4, **sizes}
    return Row(
        **where,
        op=CASE.op,
        provider=provider,
        impl=impl,
        dtype="float32",
        which_pass="full",
        divergence="huber",
        ms=ms,
        ms_p20=0.9 * ms,
        ms_p80=1.1 * ms,
        peak_mb=peak_mb,
        floor_ms=1.0,
        error=1e-7,
        **shape,
    )


def test_comparison_finds_the_faster():
    before = [fake("duet_kernels", "chunked", 10.0, 4.0), fake("torch", "eager", 30.0, 90.0)]
    after = [fake("duet_kernels", "chunked", 5.0, 2.0), fake("torch", "eager", 31.0, 90.0)]
    text = report.comparison(before, after)
    ours, theirs = (line for line in text.splitlines() if "forward + backward" in line)
    assert "| 0.50 | B | 0.50 |" in ours
    assert "| 1.03 | none (within the spread) | 1.00 |" in theirs
    assert "| 2.00 | A | 2.00 |" in report.comparison(after, before)
    assert "2 rows in both, 0 only in A, 0 only in B" in text


def test_the_table_sets_everyone_against_ours():
    text = report.tables([fake("torch", "eager", 30.0, 90.0), fake("duet_kernels", "chunked", 10.0, 4.0)])
    assert "| **duet_kernels chunked** | 10 (9 – 11) | 1 × | 4 | 10% | 1e-07 |" in text
    assert "| torch eager | 30 (27 – 33) | 3 × | 90 | 3% | 1e-07 |" in text


def test_figures_are_drawn_for_what_varies_and_their_title_says_what_is_seen(tmp_path):
    rows = [
        fake(provider, impl, factor * n, factor, n=n)
        for n in (16, 64, 256)
        for provider, impl, factor in (("duet_kernels", "chunked", 0.5), ("torch", "eager", 2.0))
    ]
    (path,) = plots.draw_all(rows, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    wanted = "At N = 256 duet_kernels is 4 times faster than torch eager, with 0.5 MiB instead of 2"
    assert plots.headline({"n": rows}) == wanted
    assert plots.draw_all(rows[:4], tmp_path / "nothing") == []  # two sizes are no line


def test_the_readme_shows_the_largest_case_of_every_device(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    rows = [
        fake(provider, impl, factor * n, factor, n=n)
        for n in (16, 64, 256)
        for provider, impl, factor in (
            ("duet_kernels", "chunked", 0.5),
            ("torch", "eager", 2.0),
            ("trl", "x", 1.0),
        )
    ]
    (folder / "bench.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    plots.draw_all(rows, folder)
    text = readme.bench_block()
    assert "N = 256" in text and "N = 64" not in text
    assert "| **128 ms, 0.5 MiB** | 512 ms (4 ×), 2 MiB | – | 256 ms (2 ×), 1 MiB (trl x) |" in text
    assert "(results/cpu/topk_distill_loss_huber_frozen.png)" in text


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
    assert [row.op for row in rows] == 3 * ["topk_distill_loss"] + 2 * ["linear_topk"]
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
