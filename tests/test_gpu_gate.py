"""`make gpu` and `make tune` without a GPU: the gate in the interpreter, that it can be red, and the measured table."""

import contextlib
import itertools
import json
import multiprocessing
import os
import typing

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated

import pytest
import torch
from servants import servant

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import conduct, gate
from benchmarks.gpu.suite import SAMPLED, SELECTIONS, Check, Skip, Suite
from duet_kernels import dispatch, measured, resolve_impl
from duet_kernels.testing import OPS, Error, operations
from duet_kernels.triton import tiles

CPU = torch.device("cpu")


def run(tmp_path, *words):
    return command.main(["--device", "cpu", "--quick", "--out", str(tmp_path), *words])


def rows_of(tmp_path):
    return gate.read_rows(tmp_path / "gate.jsonl")


# --- the gate ---------------------------------------------------------------------------------------------------


def test_sections_and_texts_choose_the_checks(tmp_path):
    assert run(tmp_path, "--gate", "--sections", "order", "k", "--only", "equal ties") == 0
    assert {row["section"] for row in rows_of(tmp_path)} == {"order"}
    assert run(tmp_path, "--gate", "--sections", "order", "--only", "equal ties", "--skip", "16") == 0
    assert {row["check"] for row in rows_of(tmp_path)} == {"equal ties fp32 k=5"}


def test_what_the_sanitizer_says():
    assert conduct.verdict(0, "x\n===== ERROR SUMMARY: 0 errors\n") == "ERROR SUMMARY: 0 errors"
    with pytest.raises(Skip, match=r"absent: .*Device not supported"):
        conduct.verdict(1, "========= Error: Device not supported")
    with pytest.raises(AssertionError, match="3 errors"):
        conduct.verdict(9, "Invalid read\n===== ERROR SUMMARY: 3 errors")
    names = {op.name for op in (*Suite(CPU).sampled, *SELECTIONS)}
    assert {name for groups in conduct.SANITIZED.values() for group in groups for name in group} == names


@pytest.mark.slow
def test_the_gate_runs_in_the_interpreter(tmp_path, capsys):
    """One check of each kind and all that is about addresses; those that need a GPU say so."""
    words = (
        "even bf16 triton",
        "beyond/",
        "ties bf16",
        "same/triton topk-",
        "autocast triton gather",
        "no host",
    )
    assert run(tmp_path, "--gate", *[w for word in words for w in ("--only", word)]) == 0
    rows = rows_of(tmp_path)
    assert {row["section"] for row in rows} == {"contract", "beyond", "order", "same", "conduct"}
    assert {row["status"] for row in rows} == {"green", "needs CUDA"}
    assert all(row["status"] == "needs CUDA" for row in rows if "no host" in row["check"])
    judged = [row for row in rows if row["section"] in ("contract", "beyond") and "slots" not in row["check"]]
    assert judged and all(0 <= row["error"] <= row["budget"] for row in judged)
    assert all({"commit", "device", "torch", "triton", "python", "seconds"} <= set(row) for row in rows)
    assert "correctness gate: green" in capsys.readouterr().out


def test_a_broken_kernel_makes_the_gate_red_and_no_speed_is_printed(tmp_path, monkeypatch, capsys):
    right = operations.topk_distill_loss

    def wrong(*args, impl, **options):
        loss = right(*args, impl=impl, **options)
        return loss + 0.05 * (loss - loss.detach()) if impl == "triton" else loss

    monkeypatch.setattr(operations, "topk_distill_loss", wrong)
    monkeypatch.setattr(command, "benchmark", lambda *_: pytest.fail("speed was measured behind a red gate"))
    assert run(tmp_path, "--only", "even bf16 triton") == 1
    status = {row["check"].removeprefix("even bf16 triton "): row["status"] for row in rows_of(tmp_path)}
    assert status["topk-huber"] == status["topk-jsd-tail"] == "red"
    assert status["gather"] == status["topk"] == "green", "a red check stops no other"
    out, err = capsys.readouterr()
    assert (
        "correctness gate: NOT GREEN, 6 green, 2 red, 0 not run" in out
        and "relative error" in out
        and "no speed" in err
    )
    assert {path.name for path in tmp_path.iterdir()} == {"gate.jsonl", "gate.md"} and " ms" not in out


def test_a_green_gate_goes_on_to_the_benchmark(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "benchmark", lambda *given: asked.append(given[1:]) or 0)
    assert run(tmp_path, "--only", "order/equal ties fp32") == 0
    ((out, seconds, colour),) = asked
    assert out == tmp_path and 0 < seconds < command.SECONDS and colour == "green"
    # Where the time did not suffice for every check the speed is measured, and the exit status says it.
    monkeypatch.setattr(gate, "run", lambda *_: "not run")
    assert run(tmp_path) == 1 and asked[1][2] == "not run"
    monkeypatch.setattr(gate, "run", lambda *_: "red")
    assert run(tmp_path) == 1 and len(asked) == 2
    assert run(tmp_path, "--anyway") == 1 and asked[2][2] == "red"
    monkeypatch.setattr(gate, "run", lambda *_: pytest.fail("a gate that was not asked for"))
    assert run(tmp_path, "--bench") == 0 and asked[3][2] == ""


def test_the_gate_keeps_time_for_the_benchmark(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(gate, "run", lambda arguments, out, seconds: given.append(seconds) or "green")
    monkeypatch.setattr(
        command, "benchmark", lambda arguments, out, seconds, colour: given.append(seconds) or 0
    )
    assert run(tmp_path, "--seconds", "500") == 0
    of_gate, of_benchmark = given
    assert of_gate == pytest.approx(500 * (1 - command.BENCHMARK_SHARE), abs=20)
    assert of_benchmark == pytest.approx(500, abs=20)  # this gate took no time
    assert run(tmp_path, "--gate", "--seconds", "500") == 0
    assert given[2] == pytest.approx(500, abs=20)


def test_a_gate_without_time_has_shown_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "benchmark", lambda *_: pytest.fail("speed was measured without a gate"))
    assert run(tmp_path, "--only", "order/equal ties", "--seconds", "0") == 1
    assert {row["status"] for row in rows_of(tmp_path)} == {"not run"}


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["--gate"]) == 2
    assert "--device cpu --quick" in capsys.readouterr().err


def test_every_operation_and_dtype_is_checked_natively():
    """New kernels come in through the table of operations; nothing is listed twice."""
    titles = [check.title for check in gate.checks_of(Suite(CPU))]
    assert len(titles) == len(set(titles))
    for op in OPS:
        for dtype in ("fp32", "bf16", "fp16"):
            for head in ("plain", "full"):
                assert f"contract/{head} {dtype} triton {op.name}" in titles
    resolved = {op.resolve for op in OPS} | {"linear_topk", "linear_token_stats"}
    assert set(dispatch.OPS) <= resolved
    assert {op.name for op in OPS} >= set(SAMPLED)


@pytest.mark.parametrize(
    "statuses, colour",
    [
        (["green", "green"], "green"),
        (["green", "needs CUDA", "absent: no such tool"], "green"),
        (["green", "not run"], "not run"),
        (["green", "not run", "red"], "red"),
        (["needs CUDA"], "red"),
        ([], "red"),
    ],
)
def test_colours(statuses, colour):
    assert gate.colour({"status": status} for status in statuses) == colour


def test_what_a_check_says():
    def raising(error):
        def run():
            raise error

        return Check("s", "n", run)

    assert gate.perform(raising(Skip("absent: x")))["status"] == "absent: x"
    red = gate.perform(raising(ValueError("hidden: wrong")))
    assert red["status"] == "red" and "ValueError: hidden: wrong" in red["said"]
    assert gate.perform(Check("s", "n", lambda: Error(1e-7, 4e-7)))["budget"] == 4e-7


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_stops_no_other_check(monkeypatch):
    monkeypatch.setattr(gate, "START_SECONDS", 1.0)
    names = ["one", "bad", "two", "sick bad", "three", "die", "four", "hang", "five"]
    checks = [Check("s", name, lambda: None, seconds=4.0) for name in names]
    rows = gate.run_checks(checks, [gate.Worker(servant)], 60, lambda row: None)
    status = dict(zip(names, (row["status"] for row in rows), strict=True))
    assert [name for name in names if status[name] == "red"] == ["bad", "sick bad", "die", "hang"]
    assert "died with exit status 3" in rows[5]["said"] and "no answer in" in rows[7]["said"]
    pids = [rows[i]["pid"] for i in (0, 1, 2, 3, 4, 6, 8)]
    # A red check costs no process; a device that no longer answers, a death and a hang cost one each.
    assert pids[0] == pids[1] == pids[2] == pids[3] and len(set(pids)) == 4


def test_a_device_that_no_longer_answers_makes_the_check_red_and_ends_the_worker(tmp_path, monkeypatch):
    checks = [
        Check("s", "fine", lambda: None),
        Check("s", "breaks it", lambda: None),
        Check("s", "more", lambda: None),
    ]
    monkeypatch.setattr(gate, "checks_of", lambda suite: checks)
    alive = iter((True, False))
    monkeypatch.setattr(gate, "answers", lambda device: next(alive))
    monkeypatch.setattr(gate.os, "dup2", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    mine, theirs = multiprocessing.Pipe()
    for check in checks:
        mine.send(check.title)
    gate.serve(theirs, "cpu", True, str(tmp_path / "log"))
    (first, last), (second, end) = mine.recv(), mine.recv()
    assert (first["status"], last, second["status"], end) == ("green", False, "red", True)
    assert "no longer answers" in second["said"] and not mine.poll()


def test_checks_that_run_alone_come_last_and_have_one_process():
    checks = [Check("s", f"check {i}", lambda: None, alone=i in (0, 3)) for i in range(6)]
    done = []
    workers = [gate.Worker(servant), gate.Worker(servant)]
    rows = gate.run_checks(checks, workers, 60, lambda row: done.append(row["check"]))
    assert [row["check"] for row in rows] == [f"s/check {i}" for i in range(6)]
    assert done[4:] == ["s/check 0", "s/check 3"]
    assert rows[0]["pid"] == rows[3]["pid"] and all(worker.process is None for worker in workers)


def test_checks_run_in_processes_of_their_own(tmp_path):
    assert run(tmp_path, "--gate", "--jobs", "1", "--only", "ties fp32", "--only", "beyond/slots") == 0
    assert [row["status"] for row in rows_of(tmp_path)] == ["green"] * 3


# --- the measured table -----------------------------------------------------------------------------------------

SMALL = tune.Shape(9, k=4, d=16, v=67)
KNOB = tune.Knob("SKINNY", (2, 16), ((128, 64, 4, 4), (128, 64, 6, 4), (256, 64, 4, 8)), "linear_topk", SMALL)


@pytest.fixture
def untouched(monkeypatch):
    """Tables and choices that a test changes are put back."""
    tables = {
        name: dict(table)
        for name, table in vars(tiles).items()
        if isinstance(table, dict) and not name.startswith("__")
    }
    yield
    for name, table in tables.items():
        vars(tiles)[name].clear()
        vars(tiles)[name].update(table)


def tuner(times, right=lambda *_: None):
    """A Tuner on a chip of its own whose clock reads `times`, by name, in the order of calls."""
    clock = iter(times)
    timer = lambda calls: {n: ms for n, ms in zip(calls, next(clock), strict=True) if ms}  # noqa: E731
    return tune.Tuner(CPU, 90, "NVIDIA H200", "abc1234", timer, right, say=lambda text: None)


def test_the_fastest_tile_is_written_read_and_used(tmp_path, untouched):
    path = tmp_path / "measured.json"
    tune.write(path, tuner([[1.0, 0.8, 0.9]]).run([KNOB], 60))
    require_right(path)
    (entry,) = measured.load(path).tiles
    assert (
        entry.key == (90, 2, 16)
        and entry.value == (128, 64, 6, 4)
        and (entry.ms, entry.default_ms) == (0.8, 1.0)
    )
    assert entry.device == "NVIDIA H200" and entry.commit == "abc1234" and "N 9" in entry.shape
    tiles.adopt([entry])
    assert tiles.skinny_tile(90, 2, 9) == tiles.SkinnyTile(128, 64, 6, 4)
    assert tiles.skinny_tile(80, 2, 9) == tiles.SKINNY[0, 2, 16]
    # Another architecture's entries stay, the same one's are replaced, and go where they gain nothing any more.
    others = entry._replace(value=(256, 64, 4, 8)), entry._replace(key=(100, 2, 16))
    tune.write(path, [tune.Verdict(tune.place_of(other), other) for other in others])
    assert {e.key: e.value[0] for e in measured.load(path).tiles} == {(90, 2, 16): 256, (100, 2, 16): 128}
    tune.write(path, tuner([[1.0, 1.0, 1.1]]).run([KNOB], 60))
    assert [e.key for e in measured.load(path).tiles] == [(100, 2, 16)]


def test_a_tile_that_gains_nothing_is_not_written(untouched):
    ((place, entry),) = tuner([[1.0, 0.99, 1.2]]).run([KNOB], 60)
    assert place == ("SKINNY", (90, 2, 16)) and entry is None
    assert list(tuner([[None, 0.5, 0.6]]).run([KNOB], 60)) == []  # the default fails: no verdict


def test_a_wrong_tile_cannot_win(untouched):
    def right(name, shape, impl, device):
        return "wrong" if tiles.skinny_tile(90, 2, 9).stages == 6 else None

    ((_, entry),) = tuner([[1.0, 0.9]], right).run([KNOB], 60)
    assert entry.value == (256, 64, 4, 8)
    assert (90, 2, 16) not in tiles.SKINNY or tiles.SKINNY[90, 2, 16].vocabulary == 256


def test_a_number_is_measured_for_one_architecture(untouched):
    knob = tune.Knob("FOLD_ROWS", (), ((32,), (64,)), "linear_topk", SMALL)
    ((_, entry),) = tuner([[1.0, 0.5]]).run([knob], 60)
    assert entry.key == (90,) and entry.value == (64,)
    assert (
        tiles.measured_number("FOLD_ROWS", 90) == 64
        and tiles.measured_number("FOLD_ROWS", 80) == tiles.FOLD_ROWS
    )


def test_auto_takes_the_kernel_but_for_exceptions(tmp_path, monkeypatch):
    path = tmp_path / "measured.json"
    steps = [
        tune.Contest("linear_topk", SMALL, (65, 0)),
        tune.Contest("linear_topk", SMALL, (1, 64)),
        tune.Contest("linear_gather", SMALL, (1, 0), (257, 0)),
    ]
    tune.write(path, tuner([[1.0, 3.1], [2.0, 1.0], [1.5, 1.0]]).run(steps, 60))
    require_right(path)
    monkeypatch.setattr(measured, "MEASURED", measured.load(path))
    monkeypatch.setattr(dispatch, "architecture", lambda device: 90)
    choice, reason = resolve_impl("linear_topk", "cuda", torch.bfloat16, tokens=64)
    assert choice == "chunked"
    assert (
        reason == f"measured on NVIDIA H200 (commit abc1234): 2.0 x faster than its Triton kernel at {SMALL}"
    )
    assert resolve_impl("linear_topk", "cuda", torch.float16, tokens=8)[0] == "chunked"  # the same size
    for others in (
        ("linear_topk", "cuda", torch.bfloat16, "auto", 65),
        ("linear_topk", "cuda", torch.bfloat16, "auto", None),
        ("linear_topk", "cuda", torch.float32, "auto", 64),
        ("linear_topk", "cuda", torch.bfloat16, "auto", 64, "sm_100"),
    ):
        *call, tokens = others[:5]
        if others[5:]:
            monkeypatch.setattr(dispatch, "architecture", lambda device: 100)
        assert resolve_impl(*call, tokens=tokens)[0] == "triton", others
    monkeypatch.setattr(dispatch, "architecture", lambda device: 90)
    assert [resolve_impl("linear_gather", "cuda", torch.bfloat16, tokens=9, k=k)[0] for k in (256, 257, None)] == [
        "triton", "chunked", "chunked",
    ]  # fmt: skip
    assert resolve_impl("linear_topk", "cuda", torch.bfloat16, "chunked", tokens=8) == (
        "chunked",
        "asked for",
    )
    assert resolve_impl("linear_topk", "cuda", torch.bfloat16, "triton", tokens=8) == ("triton", "asked for")
    assert resolve_impl("linear_topk", "cpu", torch.bfloat16)[0] == "chunked"
    # A later run in which the kernel wins takes the exception away.
    tune.write(path, tuner([[1.0, 1.0]]).run([steps[1]], 60))
    assert [e.op for e in measured.load(path).exceptions] == ["linear_gather"]


def test_an_implementation_that_does_not_run_decides_nothing():
    contest = tune.Contest("linear_topk", SMALL, 0)
    assert list(tuner([[1.0, None]]).run([contest], 60)) == []
    assert list(tuner([], right=lambda *_: "wrong").run([contest], 60)) == []
    assert list(tuner([]).run([contest], -1)) == []  # no time left


SLOWER = {
    "op": "linear_topk", "arch": 90, "itemsize": 2, "tokens": [1, 64], "k": [0, 0],
    "triton_ms": 2.0, "chunked_ms": 1.0, "shape": "N 1", "device": "NVIDIA H200", "commit": "abc",
}  # fmt: skip
TILE = {
    "table": "SKINNY", "key": [90, 2, 16], "value": [128, 64, 6, 4], "ms": 1.0, "default_ms": 2.0,
    "shape": "N 1", "device": "NVIDIA H200", "commit": "abc",
}  # fmt: skip


def require_right(path):
    """That the values of the file have the types of their fields, and that limits and times fit each other."""
    content = json.loads(path.read_text())
    for name, kind in (("exceptions", measured.Slower), ("tiles", measured.Tile)):
        for entry in content[name]:
            for field, wanted in typing.get_type_hints(kind).items():
                value = entry[field]
                if wanted in (int, float, str):
                    assert type(value) in ((int, float) if wanted is float else (wanted,)), (field, value)
                else:
                    assert type(value) is list and {type(x) for x in value} == {int}, (field, value)
    for entry in measured.load(path).exceptions:
        for least, most in (entry.tokens, entry.k):
            assert least >= 0 and (most == 0 or least <= most), entry
        assert 0 < entry.chunked_ms < entry.triton_ms, entry


def test_the_packaged_file_is_right():
    require_right(measured.PATH)
    assert measured.load() == measured.MEASURED


@pytest.mark.parametrize(
    "kind, change",
    [
        ("exceptions", {"arch": "90"}),
        ("exceptions", {"tokens": [64]}),
        ("exceptions", {"k": [64, 1]}),
        ("exceptions", {"chunked_ms": 0.0}),
        ("exceptions", {"triton_ms": 0.9}),
        ("tiles", {"key": [90, "2"]}),
        ("tiles", {"ms": "1.0"}),
    ],
)
def test_a_wrong_value_would_be_seen(kind, change, tmp_path):
    path, entry = tmp_path / "measured.json", SLOWER if kind == "exceptions" else TILE
    for last, seen in (
        (entry, contextlib.nullcontext()),
        ({**entry, **change}, pytest.raises((AssertionError, ValueError))),
    ):
        path.write_text(json.dumps({"format": 2, "exceptions": [], "tiles": [], kind: [entry, last]}))
        with seen:
            require_right(path)


@pytest.mark.parametrize(
    "content, error, wanted",
    [
        ({"format": 1, "exceptions": [], "tiles": []}, ValueError, r"measured\.json: wanted format 2, got 1"),
        ({}, ValueError, "got None"),
        ({"format": 2, "exceptions": [{**SLOWER, "speed": 1}], "tiles": []}, TypeError, "speed"),
        ({"format": 2, "exceptions": [], "tiles": [{"table": "SKINNY"}]}, TypeError, "key"),
    ],
)
def test_another_format_and_other_fields_are_refused(content, error, wanted, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(content))
    with pytest.raises(error, match=wanted):
        measured.load(path)


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"table": "SKINY"}, r"SKINY\[90, 2, 16\]: no such entry"),
        ({"table": "TILES"}, "no such entry"),
        ({"key": (90, 3, 16)}, "no such entry"),
        ({"key": (0, 2, 16)}, "wanted an architecture first"),
        ({"value": (128, 64, 6)}, "wanted vocabulary, depth, stages, warps"),
        ({"value": (128, 64, 6, 0)}, "each at least 1"),
        ({"table": "FOLD_ROWS"}, "one number"),
        ({"table": "TOPK_SKINNY_TOKENS", "key": (90,), "value": (128,)}, "from 1 to 64"),
    ],
)
def test_an_entry_without_a_place_is_refused_by_name(change, wanted, untouched):
    entry = measured.Tile(**{**TILE, "key": (90, 2, 16), "value": (128, 64, 6, 4), **change})
    with pytest.raises(ValueError, match=wanted):
        tiles.adopt([entry])


def test_the_plan(capsys):
    """Every value has a place, the reasoned one stands first, and every operation with a kernel is contested."""
    for step in tune.plan():
        if isinstance(step, tune.Knob):
            assert len(step.values) == len(set(step.values)) > 1
            for value in step.values:
                entry = measured.Tile(step.table, (90, *step.key), value, 1.0, 1.0, "", "", "")
                _, _, row = tiles.place_of(entry)
                default = getattr(tiles, step.table)
                default = default[0, *step.key] if isinstance(default, dict) else default
                assert (row == default) == (value == step.values[0])
    contests = [step for step in tune.plan() if isinstance(step, tune.Contest)]
    assert {step.op for step in contests} == set(dispatch.OPS)
    for op in dispatch.OPS:
        limits = [(s.tokens, s.k, s.shape.itemsize) for s in contests if s.op == op]
        assert len(set(limits)) == len(limits)
        for n, k in itertools.product((1, 64, 65, 4096, 4097, None), (0, 1, 64, 256, 257, 1000, None)):
            takers = [
                step
                for step in contests
                if step.op == op and step.shape.itemsize == 2
                and measured.Slower(op, 90, 2, step.tokens, step.k, 2.0, 1.0, "", "", "").takes(n, k)
            ]  # fmt: skip
            assert len(takers) <= 1 and (takers or op in tune.BY_K), (op, n, k)
    assert tune.main(["--plan"]) == 0
    assert "SKINNY[2, 64]" in capsys.readouterr().out


@pytest.mark.parametrize("impl", ["triton", "chunked"])
@pytest.mark.parametrize("name", [*tune.CONTESTED, "linear_gather dh", "linear_gather dW"])
def test_what_is_timed_runs(name, impl):
    inputs = tune.Inputs.of(SMALL, CPU)
    result = tune.call_of(name, inputs, impl)()
    tensors = [
        x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor)
    ]
    assert tensors and all(x.isfinite().all() for x in tensors)


def test_what_is_timed_is_judged_first(monkeypatch):
    assert tune.is_right("linear_gather dh", SMALL, "triton", CPU) is None
    from duet_kernels import triton as kernels

    right = kernels.linear_gather_backward

    def wrong(*args):
        dhidden, *others = right(*args)
        return None if dhidden is None else 1.05 * dhidden, *others

    monkeypatch.setattr(kernels, "linear_gather_backward", wrong)
    assert tune.is_right("linear_gather dh", SMALL, "triton", CPU) is not None
