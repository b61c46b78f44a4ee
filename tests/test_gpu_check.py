"""``python -m fused_dropout gpu-check`` without a GPU: its message, report, processes and time limits."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import fused_dropout as fd
from fused_dropout import __main__
from fused_dropout.bench.gpu import check as gpu_check
from fused_dropout.bench.gpu import correctness
from fused_dropout.bench.gpu import report as gpu_report
from fused_dropout.bench.gpu import speed as gpu_speed
from fused_dropout.bench.gpu.report import Bandwidth, Check, Clocks, HostTime, Note, Overlap, Step
from fused_dropout.bench.timing import MIN_ROUNDS, Contender

MACHINE = {"gpu": {"name": "NVIDIA Test-1 80GB", "processors": 1}, "torch": "2.13.0", "cuda": "13.0"}
OVERLAP = Overlap("F.dropout", "float16", 2**20, 0.001, {"-1": 0.0004, "+0": -0.0007, "+1": 0.0002})


def speed(implementation, numel, us, case="forward", dtype="float16", **others):
    spread = {"us": us, "us_p10": us - 1, "us_p90": us + 1, "of_copy": 8 / us, "of_copy_p10": 0.9, "of_copy_p90": 1.0}
    return Bandwidth(
        case, dtype, numel, implementation, gb_s=4 * numel / us / 1e3, samples=9, buffers=3, **spread | others
    )


@pytest.fixture
def report():
    records = [
        Check("the CPU's bits", "passed", "2^0 to 2^28", 3.0),
        Check("a | pipe", "failed", "AssertionError: 3 of 5 differ", 0.1),
        *(speed(name, 2**k, us) for k in (20, 10) for name, us in (("copy", 8.0), ("fd", 10.0), ("fd, graph", 9.0))),
        speed("F.dropout", 2**20, 16.0, case="in place", dtype="float32"),
        HostTime("forward", "fd.dropout", 4.0, 3.9, 4.1),
        Step("1 x 128 x 768", "p = 0", 1.5, 1.4, 1.6, 100.0),
        OVERLAP,
        Clocks("idle", {"clocks.sm": "1980 MHz"}),
        Note("nothing is measured here"),
    ]
    made = {"machine": MACHINE, "options": {"seconds": 440.0, "quick": False, "p": 0.1}}
    made |= {kind: [] for kind in gpu_report.KINDS}
    for record in records:
        assert str(record)
        made[gpu_report.kind_of(record)].append(asdict(record))
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(capsys):
    assert __main__.main(["gpu-check"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu-check: torch")
    assert "CUDA" in said
    assert len(said.splitlines()) == 1


def test_refuses_a_folder_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--json", "no/such/folder/x.json"])
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("plots", [True, False])
def test_report(report, plots, tmp_path, monkeypatch):
    if plots:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(gpu_report, "find_spec", lambda _: None)
    path = gpu_check.report_path(tmp_path, MACHINE)
    written = gpu_report.write(report, path)
    assert path == tmp_path / "nvidia-test-1-80gb-torch2.13.0.json"
    pictures = ["forward.svg", "in-place.svg"] if plots else []
    assert [p.name for p in written] == [path.name, f"{path.stem}.md", *(f"{path.stem}-{p}" for p in pictures)]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert json.loads(path.read_text())["speed"] == report["speed"]
    page = written[1].read_text()
    assert page.startswith("# NVIDIA Test-1 80GB, torch 2.13.0\n")
    for line in (
        "| failed | a \\| pipe | AssertionError: 3 of 5 differ |",
        "| clocks.sm, idle | 1980 MHz |",
        "| float16 | 2^10 | 8.00 (7.00-9.00) | 10.0 (9.00-11.0) | 9.00 (8.00-10.0) | 0.800 (0.900-1.000) |",
        "| forward | fd.dropout | 4.00 (3.90-4.10) |",
        "| 1 x 128 x 768 | p = 0 | 1.50 (1.40-1.60) | 100 |",
        "| F.dropout | float16 | 2^20 | -0.0007 | +0 | 0.0010 | +0.0004 -0.0007 +0.0002 |",
        "- nothing is measured here",
    ):
        assert line in page
    assert ("no plots" in page) != plots
    assert all(f"({p.name})" in page for p in written[2:])


def test_summary_names_what_failed(report):
    lines = "\n".join(gpu_report.summary(report))
    assert "1 passed, 1 failed, 0 skipped" in lines
    assert "failed: a | pipe: AssertionError: 3 of 5 differ" in lines
    assert "forward, float16, fd, of the copy's bandwidth: 2^20 0.800" in lines


def test_report_of_nothing(tmp_path):
    """The report works if all parts failed."""
    empty = {"machine": MACHINE, "options": {"seconds": 60.0, "quick": True, "p": 0.1}}
    written = gpu_report.write(empty | {kind: [] for kind in gpu_report.KINDS}, tmp_path / "x.json")
    assert "60 s, quick" in written[1].read_text()


def test_default_path_of_the_report():
    assert str(gpu_check.report_path(None, MACHINE)) == "fused_dropout_gpu_nvidia-test-1-80gb-torch2.13.0.json"


@pytest.mark.gpu
def test_the_short_checks_pass():
    """The checks that compute-sanitizer runs."""
    results = list(correctness.short(True, math.inf))
    assert len(results) == 5
    assert {check.result for check in results} == {"passed"}


@pytest.mark.parametrize("shift", [-8, 0, 4])
def test_overlap_finds_a_planted_shift(shift, key):
    """Half of the second mask, four of each eight elements, is a shifted copy: a generator advanced too little."""
    n = 2**16
    first = fd.keep_mask((n,), 0.5, key)
    fresh = fd.keep_mask((n,), 0.5, torch.tensor([7, 7], dtype=torch.uint64))
    second = torch.where(torch.arange(n) % 8 < 4, first.roll(-shift), fresh)
    found = correctness.overlap(first, second)
    assert list(found) == [f"{s:+d}" for s in range(-8, 9)]
    assert found.pop(f"{shift:+d}") == pytest.approx(0.5, abs=0.02)
    assert all(abs(rest) < 6 / math.sqrt(n) for rest in found.values())


def test_overlap_of_independent_masks_at_another_rate(key):
    masks = [fd.keep_mask((2**16,), 0.1, torch.tensor([k, 0], dtype=torch.uint64)) for k in (1, 2)]
    assert all(abs(found) < 6 / 2**8 for found in correctness.overlap(*masks).values())


def test_same_is_exact():
    x = torch.tensor([1.0, -0.0, math.nan, 4.0]).reshape(2, 2)
    correctness.same(x, x.clone())
    for wrong in (x * torch.tensor([1.0, -1.0]), torch.nextafter(x, x + 1), x.t().contiguous().t()):
        with pytest.raises(AssertionError):
            correctness.same(x, wrong)


def test_parts_share_the_time():
    """Time that one part does not use goes to the others. A part without enough time to start is not started."""
    left, given = 400.0, []
    for name in gpu_check.PARTS:
        given.append(gpu_check.allot(left, name))
        left -= given[-1]
    assert left == pytest.approx(0)
    weights = [part.weight for part in gpu_check.PARTS.values()]
    assert given == pytest.approx([400 * weight / sum(weights) for weight in weights])
    last = list(gpu_check.PARTS)[-1]
    assert gpu_check.allot(100.0, last) == 100
    assert gpu_check.allot(20.0, "graphs") >= gpu_check._LEAST
    assert gpu_check.allot(1.0, last) == 0


def test_speeds_stop_in_time(monkeypatch):
    measured = []

    def measure(case, dtype, log2, seconds):
        measured.append((case, log2, dtype))
        time.sleep(0.02)
        yield Note("")

    monkeypatch.setattr(gpu_speed, "measure_speed", measure)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    *_, last = gpu_speed.speeds(False, time.perf_counter() + 0.1)
    total = len(gpu_speed.CASES) * len(gpu_speed.LOG2_SIZES) * len(gpu_speed.DTYPES)
    assert 0 < len(measured) < 8
    assert measured[0] == ("forward", 24, "float32")
    assert last.text.startswith(f"no time left for {total - len(measured)} cases: ")


def test_buffers_take_turns():
    taken = []
    call = gpu_speed.in_turn([lambda i=i: taken.append(i) for i in range(3)])
    for _ in range(4):
        call()
    assert taken == [0, 1, 2, 0]


def test_records_of_a_measurement(monkeypatch, tmp_path):
    """The copy's share is 1. A contender with twice its time has half the bandwidth. The JSON calls both "speed"."""

    def contenders_for(case, dtype, log2, buffers):
        for name, ns in (("copy", 1e6), ("fd", 2e6)):
            yield name, lambda ns=ns: Contender(lambda: None, lambda call, calls: calls * ns)
        yield "broken", lambda: 1 / 0

    monkeypatch.setattr(gpu_speed, "contenders_for", contenders_for)
    monkeypatch.setattr(gpu_speed, "buffer_count", lambda case, nbytes: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    part = gpu_check.Part(lambda quick, deadline: gpu_speed.measure_speed("forward", "float16", 20, 0.0), 1)
    options = gpu_check._parse(["--seconds", "9", "--json", str(tmp_path / "records")])
    try:
        assert gpu_check.run_part(part, options) == 0
    finally:
        signal.alarm(0)
    note, copy, ours = map(json.loads, (tmp_path / "records").read_text().splitlines())
    assert note["kind"] == "note"
    assert "broken left out: ZeroDivisionError" in note["text"]
    assert copy["kind"] == ours["kind"] == "speed"
    assert [copy[name] for name in ("us", "of_copy", "gb_s")] == pytest.approx([1000, 1, 4 * 2**20 / 1e6])
    assert [ours[name] for name in ("us", "of_copy", "gb_s")] == pytest.approx([2000, 0.5, 2 * 2**20 / 1e6])
    assert ours["samples"] == MIN_ROUNDS
    assert ours["buffers"] == 3


def test_buffers_hold_more_than_the_cache(monkeypatch):
    """An in-place call uses one buffer, other calls use two."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    for case, touched in (("forward", 2), ("in place", 1), ("backward", 2)):
        for log2 in (20, 24, 30):
            count = gpu_speed.buffer_count(case, 2**log2)
            assert count * touched * 2**log2 >= min(3 * 50 << 20, gpu_speed._MAX_BUFFERS * touched * 2**log2)


@pytest.mark.parametrize(("capability", "in_eager"), [((7, 5), True), ((8, 0), False)])
def test_compiled_code_that_runs_in_eager_is_labelled(capability, in_eager, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    label = "F.dropout, compiled (runs in eager here)"
    assert (label in gpu_speed.implementations("forward", "bfloat16", 24)) == in_eager
    assert label not in gpu_speed.implementations("forward", "float16", 24)
    assert ("(runs in eager here)" in gpu_speed.label_of_compiled("bfloat16")) == in_eager


def test_the_load_lasts_until_the_clocks_are_read(monkeypatch):
    copies, stand_in = [], torch.zeros(2, 4)
    monkeypatch.setattr(torch, "randn", lambda *size, device: stand_in)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: copies.append(1) or time.sleep(0.01))

    def ask():
        before = len(copies)
        time.sleep(0.2)
        return {"copies while asking": len(copies) - before}

    assert gpu_check.under_load(ask)["copies while asking"] > 2
    left = len(copies)
    time.sleep(0.05)
    assert len(copies) == left


@pytest.mark.parametrize("case", gpu_speed.CASES)
def test_calls_go_round_the_buffers(case):
    values, others, outputs = torch.ones(3, 64), torch.full((3, 64), 2.0), [None] * 3
    made = partial(fd.dropout, p=0.5, inplace=case == "in place")
    calls = gpu_speed.calls_of(lambda: made, case, values, others, outputs)
    assert len(calls) == 3
    calls[1]()
    touched = [output is not None for output in outputs]
    if case == "in place":
        touched = [bool((row == 0).any()) for row in values]
    else:
        assert set(outputs[1].unique().tolist()) == {0.0, 4.0 if case.endswith("backward") else 2.0}
    assert touched == [False, True, False]


def test_checks_survive_each_other(monkeypatch):
    def fail():
        raise ValueError("wrong\nand more")

    def skip():
        raise correctness.Skipped("not here")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    named = {"a": fail, "b": skip, "c": lambda: "fine", "d": lambda: None}
    results = [(c.name, c.result, c.detail) for c in correctness.run_checks(named, time.perf_counter() + 60)]
    expected = [("a", "failed", "ValueError: wrong"), ("b", "skipped", "not here"), ("c", "passed", "fine")]
    assert results == [*expected, ("d", "passed", "")]
    (late,) = correctness.run_checks({"a": fail}, time.perf_counter() - 1)
    assert (late.result, late.detail) == ("skipped", "there was no time left")


def test_checks_after_the_gpu_is_lost(monkeypatch):
    def lose():
        raise RuntimeError("illegal address")

    monkeypatch.setattr(torch.cuda, "synchronize", lose)
    results = list(correctness.run_checks({"a": lose, "b": lambda: "fine"}, time.perf_counter() + 60))
    assert [check.result for check in results] == ["failed", "failed"]
    assert "not run" in results[1].detail


def test_parts_survive_each_other(monkeypatch, report):
    """One part ends normally, one crashes after its first record, and one never ends."""
    line = json.dumps({"kind": "check", **asdict(Check("fine", "passed", ""))})
    ends = {"checks": "", "graphs": "import os; os.abort()", "overlap": "import time; time.sleep(60)"}

    def command(part, quick, seconds, path):
        return [sys.executable, "-c", f"open({str(path)!r}, 'w').write({line + chr(10)!r})\n{ends[part]}"]

    monkeypatch.setattr(gpu_check, "PARTS", {name: gpu_check.PARTS[name] for name in ends})
    monkeypatch.setattr(gpu_check, "command", command)
    monkeypatch.setattr(gpu_check, "_GRACE", 0.0)
    monkeypatch.setattr(gpu_check, "_LEAST", 0.1)
    report["check"].clear()
    gpu_check.run_parts(gpu_check._parse(["--seconds", "2"]), report)
    results = [(check["name"], check["result"]) for check in report["check"]]
    fine = ("fine", "passed")
    assert results == [fine, fine, ("part graphs", "failed"), fine, ("part overlap", "failed")]


def test_a_process_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    alive = tmp_path / "alive"
    late = f"import time; time.sleep(1.5); open({str(alive)!r}, 'w')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_check.run_alone([sys.executable, "-c", outer], 1.0)
    time.sleep(1.0)
    assert not alive.exists()


@pytest.mark.parametrize(
    ("status", "said", "result"),
    [
        (0, "passed 0.1 s  keys\n========= ERROR SUMMARY: 0 errors", "passed"),
        (99, "=========     at void at::fill_kernel<float>+0x10\n========= ERROR SUMMARY: 1 error", "passed"),
        (99, "=========     at void dropout_kernel<float>+0x10\n========= ERROR SUMMARY: 1 error", "failed"),
        (99, "=========     at void window_kernel<float>+0x10\n========= ERROR SUMMARY: 1 error", "failed"),
        (99, "=========     at write_keys_kernel+0x10\n========= ERROR SUMMARY: 1 error", "failed"),
        (1, "failed 0.1 s  keys\n========= ERROR SUMMARY: 0 errors", "failed"),
        (255, "========= Error: Internal Sanitizer Error", "skipped"),
    ],
)
def test_verdict_of_the_sanitizer(status, said, result):
    assert gpu_check.sanitizer_verdict(status, said)[0] == result


def test_sanitizer_in_place_of_the_tool(tmp_path, monkeypatch):
    """The stand-in runs once for each tool, with a command that runs the short checks."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors of $*"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = list(gpu_check.sanitize(True, time.perf_counter() + 60))
    assert [check.result for check in found] == ["passed"] * 2
    for check, name in zip(found, ("memcheck", "initcheck"), strict=True):
        assert f"--tool {name}" in check.detail
        assert "--kernel-name kernel_substring=fused_dropout" in check.detail
        assert "gpu-check --part short" in check.detail
