"""What is made of measured rows: tables, comparisons, figures, README's blocks."""

import dataclasses
import json

import pytest
from test_benchmarks import CASE

from benchmarks import (
    anchor,
    harness,
    plots,
    readme,
    report,
    training_step,
)
from benchmarks.gpu import gate
from benchmarks.harness import Row


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


def test_a_peer_that_was_measured_at_another_commit_says_so():
    peer = dataclasses.replace(fake("liger", "JSD", 9.0, 1.0), provider_version="0.8", commit="old")
    compiled = dataclasses.replace(fake("torch", "compile", 9.0, 1.0), commit="old")
    rows = [fake("torch", "eager", 9.0, 1.0), peer, compiled]
    assert "liger 0.8, commit c" in report.where(rows)
    assert "Measured at c: torch eager; old: liger, torch compile." in report.tables(rows)
    assert report.measured_at(rows[:1]) == []
    again = dataclasses.replace(compiled, commit="c", op="linear_topk")
    said = "c: torch compile (`linear_topk`), torch eager; old: liger, torch compile (`topk_distill_loss`)."
    assert said in report.measured_at([*rows, again])[1]


def test_clocks_have_names():
    row = dataclasses.replace(
        fake("torch", "eager", 9.0, 1.0), driver="5", clocks="345 MHz, 3201 MHz, 1980 MHz"
    )
    said = "clocks when a run began: SM 345 MHz (at most 1980 MHz), memory 3201 MHz"
    assert f"driver 5, {said}, torch t" in report.where([row])
    assert said in gate.page({"device": "d", "clocks": row.clocks}, [])
    settled = dataclasses.replace(row, clocks="1980 MHz, 3201 MHz, 1980 MHz")
    assert "SM 345 MHz or 1980 MHz (at most 1980 MHz), memory 3201 MHz, torch" in report.where([settled, row])


def test_of_two_sessions_no_spread_is_compared():
    mine, theirs = fake(report.OURS, "triton", 10.0, 1.0), fake("torch", "compile", 10.0, 0.5)
    *_, same = report.better_elsewhere([mine, theirs])
    *_, other = report.better_elsewhere([mine, dataclasses.replace(theirs, commit="another")])
    assert "(within the spread)" in same and "(another session)" in other and "spread" not in other


def test_who_was_measured_is_not_called_absent():
    absent = {"ms": None, "status": "absent: liger_kernel is not installed"}
    ran = fake("liger", "JSD", 9.0, 1.0)
    gone = dataclasses.replace(ran, **absent)
    assert report.absences([ran, gone]) == []
    (line,) = report.absences([ran, dataclasses.replace(gone, head="trainable")])[3:]
    assert "liger JSD (`topk_distill_loss` huber, trainable head" in line and line.endswith(
        "is not installed"
    )
    assert report.absences([gone])[3:] == ["* liger JSD (`topk_distill_loss`): liger_kernel is not installed"]


def test_a_generalised_jsd_says_that_it_is_forward_kl():
    row = dataclasses.replace(fake("liger", "chunked JSD", 9.0, 1.0), divergence="forward_kl")
    assert "| liger chunked JSD at beta 0, forward KL | 9 (" in report.tables([row])
    assert "beta" not in report.called(dataclasses.replace(row, divergence="jsd"))


def test_what_a_smaller_workspace_costs():
    sizes = ("triton 256 MiB", 256, 30.1, 379.0), ("triton", 2236, 27.2, 2134.0)
    rows = [
        dataclasses.replace(fake("duet_kernels", impl, ms, mib), workspace_mb=mb)
        for impl, mb, ms, mib in sizes
    ]
    head, _, line = report.workspaces(rows)
    assert head == "| | 256 MiB | 2236 MiB, the default when measured |"
    assert line.endswith("| 30.1 ms, 379 MiB | 27.2 ms, 2134 MiB |")
    assert report.workspaces(rows[:1]) == []


def test_the_better_choice_is_one_that_no_row_of_ours_equals():
    ours = [fake("duet_kernels", "triton", 27.0, 2000.0), fake("duet_kernels", "triton 256 MiB", 30.0, 400.0)]
    smaller, faster = fake("liger", "CE", 29.0, 100.0), fake("torch", "compile", 20.0, 6000.0)
    worse = fake("torch", "eager", 35.0, 12000.0), fake("torch", "row chunks", 31.0, 400.0)
    lines = report.better_elsewhere([*ours, smaller, faster, *worse])[2:]
    assert [line.split(" | ")[1].split(":")[0] for line in lines] == ["torch compile", "liger CE"]
    assert lines[0].endswith("| 0.741 × 27 ms | 15 × 400 MiB |")
    assert "| 1.07 × 27 ms (within the spread) | 0.25 × 400 MiB |" in lines[1]
    assert report.better_elsewhere([*ours, *worse]) == []


@pytest.mark.parametrize("device", ["cpu", "nvidia-h200"])
def test_pages_say_what_their_rows_say(device, tmp_path, capsys):
    folder = readme.RESULTS / device
    for path in folder.glob("*.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
    made = [path.with_suffix(".md").name for path in folder.glob("training_step*.jsonl")]
    training_step.redrawn(tmp_path)
    (tmp_path / "bench.md").write_text(report.tables(harness.read_rows(folder / "bench.jsonl")) + "\n")
    made.append("bench.md")
    if (folder / "gate.jsonl").exists():
        where, *rows = map(json.loads, (folder / "gate.jsonl").read_text().splitlines())
        (tmp_path / "gate.md").write_text(gate.page(where, rows))
        anchor.main(["--figures", "--out", str(tmp_path), "--gate", gate.colour(rows)])
        made += ["gate.md", "kernels.md", "targets.md"]
    for name in made:
        assert (tmp_path / name).read_text() == (folder / name).read_text(), name


def test_the_table_sets_everyone_against_ours():
    text = report.tables([fake("torch", "eager", 30.0, 90.0), fake("duet_kernels", "chunked", 10.0, 4.0)])
    assert "| **duet_kernels chunked** | 10 (9 – 11) | 1 × | 4 | 10% | 1e-07 |" in text
    assert "| torch eager | 30 (27 – 33) | 3 × | 90 | 3% | 1e-07 |" in text


def test_the_short_table_says_where_ours_failed():
    failed = {"ms": None, "gate": "red", "status": "wrong: loss errs by 2.0e-01"}
    ours = [
        dataclasses.replace(fake("duet_kernels", impl, 1.0, 1.0), **failed) for impl in ("chunked", "triton")
    ]
    ours[1] = dataclasses.replace(ours[1], gate="not run", status="absent: no GPU")
    smaller = [fake("duet_kernels", "chunked", 1.0, 1.0, n=2), fake("torch", "eager", 2.0, 1.0, n=2)]
    rows = [*ours, fake("torch", "eager", 30.0, 90.0), *smaller]
    (line,) = report.summary(rows)[2:]
    assert "| gate red, wrong: loss errs by 2.0e-01 (chunked) | 30 ms, 90 MiB |" in line
    assert report.summary([ours[1], *rows[2:]])[2:] == report.summary(smaller)[2:]


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
    without = plots.headline({"n": [row for row in rows if row.provider == "torch"]})
    assert without == "without duet_kernels, which was not measured here"


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
    text = readme.device_block(on_cpu=True)
    assert "N = 256" in text and "N = 64" not in text
    older = dataclasses.replace(rows[-1], commit="older")
    (folder / "bench.jsonl").write_text("".join(row.to_json() + "\n" for row in [*rows[:-1], older]))
    at = "Measured at c: duet_kernels, torch eager, trl (`topk_distill_loss`); older: trl (`topk_distill_loss`)."
    assert f"\n\n{at}\n" in readme.device_block(on_cpu=True)
    assert f"(results/cpu/bench.md). {at}\n" in readme.device_block(on_cpu=True, short=True)
    (folder / "bench.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    (folder / "gate.md").write_text("")
    statuses = "green", "green", "red", "not run", "needs CUDA"
    lines = [{"commit": "c"}, *({"status": status} for status in statuses)]
    (folder / "gate.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = readme.device_block(on_cpu=True)
    assert "| **128 ms, 0.5 MiB** (chunked) | 512 ms (4 ×), 2 MiB | – | 256 ms (2 ×), 1 MiB (trl x) |" in text
    assert "(results/cpu/topk_distill_loss_huber_frozen.png)" in text
    assert (
        "[all numbers](results/cpu/bench.md), [2 of 5 checks green, 1 red, 1 not run](results/cpu/gate.md)."
        in text
    )
