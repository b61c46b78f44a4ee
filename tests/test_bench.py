"""``python -m fused_dropout bench`` end to end in its quick setting: all results are there and plausible."""

import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from fused_dropout.bench import command, environment, speed, tables, timing
from fused_dropout.bench.memory import measure_memory
from fused_dropout.bench.progress import progress
from fused_dropout.bench.workloads import MEMORY_WORKLOADS, MODULES, AdaptedLayer, P

MODELS = list(itertools.product(["nn.Dropout", "fd.Dropout", "p = 0"], [False, True]))

# The fake GPU has no meaningful times.
pytestmark = pytest.mark.torch_copies


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def result(request, tmp_path_factory):
    """The JSON of one run, on one thread: with several, other work on the machine can stall OpenMP's barriers."""
    path, threads = tmp_path_factory.mktemp("bench") / "result.json", torch.get_num_threads()
    try:
        assert command.main(["--quick", "--json", str(path), "--device", request.param, "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text()) | {"device": request.param}


def test_environment(result, info):
    environment = result["environment"]
    assert environment["fused_dropout"] == info.version
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    assert environment["backend_info"]["devices"] == info.devices


def test_speed(result):
    cases = {(r["dtype"], r["numel"], r["case"]) for r in result["speed"] if r["case"] != "eval"}
    assert cases == {(t, n, c) for t in speed.DTYPES for n in speed.SIZES[result["device"]] for c in speed.CASES}
    assert len(result["speed"]) == len(cases) + 1
    for r in result["speed"]:
        assert r["device"] == result["device"]
        assert r["p"] == P
        assert r["torch_ns"] > 0
        assert r["fd_ns"] > 0
        assert 0 < r["ratio_p10"] <= r["ratio"] <= r["ratio_p90"] < math.inf
        assert r["samples"] >= 5


def test_goes_on_without_what_there_is_no_memory_for(capsys):
    def fail(error):
        raise error

    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes.")
    found = [partial(fail, torch.OutOfMemoryError("CUDA out of memory.")), lambda: ["a record"], partial(fail, cpu)]
    report = {"speed": [], "skipped": []}
    command.execute([command.Task("speed", f"task {i}", run) for i, run in enumerate(found)], report, threads=1)
    assert report["speed"] == ["a record"]
    assert report["skipped"] == ["task 0: not enough memory", "task 2: not enough memory"]
    with pytest.raises(RuntimeError, match="another"):
        command.execute([command.Task("speed", "task", partial(fail, RuntimeError("another")))], report, threads=1)


def test_saved_bytes(result):
    (saved,) = result["saved_bytes"]
    assert saved["fd"] == 16
    assert saved["torch"] >= saved["numel"]


def test_drop_rate(result):
    """The seed is fixed, so each run has the same draws."""
    rates = {(r["module"], r["p"]): r for r in result["drop_rate"]}
    assert rates.keys() == {(module, p) for module in MODULES for p in (0.1, 0.5)}
    for (_, p), r in rates.items():
        assert r["low"] < r["rate"] < r["high"]
        assert r["inside"] == (r["low"] <= p <= r["high"])
        assert r["high"] - r["low"] == pytest.approx(2 * 2.5758 * math.sqrt(p * (1 - p) / r["draws"]), rel=0.01)
    assert rates["fd.Dropout", 0.1]["inside"]
    assert rates["fd.Dropout", 0.5]["inside"]


@pytest.mark.skipif(not find_spec("sklearn"), reason="needs scikit-learn")
def test_training(result):
    assert [r["module"] for r in result["training"]] == list(MODULES)
    for r in result["training"]:
        assert r["accuracy"] > 0.85
        assert 0 < r["loss"] < 0.5
        assert r["seconds"] > 0


RECORD = speed.Comparison("cpu", "float32", 2**10, "forward", P, 2.0, 1.0, 2.0, 1.9, 2.1, 5)


@pytest.fixture
def one_record(tmp_path, monkeypatch):
    """Replaces all measurements by RECORD, in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "plan", lambda *_: [command.Task("speed", "a task", lambda: [RECORD])])
    return tmp_path


def test_writes_only_where_it_is_told_to(one_record, capsys):
    assert command.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "2.00x ±5.0 %" in said
    assert "Nothing was saved: --json FILE" in said
    assert list(one_record.iterdir()) == []
    assert command.main(["--device", "cpu", "--json", "x.json"]) == 0
    assert "Numbers: x.json" in capsys.readouterr().out
    assert [path.name for path in one_record.iterdir()] == ["x.json"]


def test_interrupted(one_record, monkeypatch, capsys):
    """Ctrl-C keeps the results so far."""

    def interrupt():
        raise KeyboardInterrupt

    (task,) = command.plan()
    monkeypatch.setattr(command, "plan", lambda *_: [task, command.Task("speed", "another", interrupt)])
    assert command.main(["--device", "cpu", "--json", "x.json"]) == 130
    assert json.loads((one_record / "x.json").read_text())["speed"] == [asdict(RECORD)]
    said = capsys.readouterr().out
    assert "2.00x" in said
    assert "Interrupted" in said


@pytest.mark.parametrize(("share", "warned"), [(0.99, False), (0.6, True)])
def test_busy_machine(share, warned, one_record, monkeypatch, capsys):
    """The warning goes to standard error, and to the output after the results."""
    monkeypatch.setattr(command, "cpu_share", lambda threads: share)
    command.main(["--device", "cpu"])
    said = capsys.readouterr()
    for text in (said.err, said.out):
        assert ("WARNING: the machine is busy" in text) == warned
    assert f"got {100 * share:.0f} % of the CPU time" in said.out


def test_share_of_the_cpu():
    """With more busy threads than cores, the share falls below 1."""
    assert 0 < environment.cpu_share(4 * os.cpu_count()) < 0.5


@pytest.mark.parametrize("arguments", [["--json", "no/such/folder/x.json"], ["--json", "."], ["--device", "cuda"]])
def test_refusals(arguments, tmp_path, monkeypatch, capsys):
    """Wrong arguments are refused at once, not after two minutes."""
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert ("is a folder" if "." in arguments else "there is no") in capsys.readouterr().err


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_progress(with_tqdm, monkeypatch, capsys):
    """A progress bar with tqdm, lines without it. Neither writes to standard output."""
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    seconds = itertools.count(0, 6)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    assert list(progress("abcd", lambda item: f"task {item}")) == list("abcd")
    said = capsys.readouterr()
    assert said.out == ""
    if with_tqdm:
        assert "task d" in said.err
        assert "/4, " in said.err
    else:
        assert said.err.splitlines() == ["1 of 4 done, now task b", "3 of 4 done, now task d"]


def test_width_of_the_table():
    """At most 100 columns, with the widest expected numbers."""
    wide = [
        speed.Comparison("cpu", dtype, numel, case, P, 987654e3 / numel, 98765e3 / numel, 10.0, 10.0, 10.0, 5)
        for dtype, numel, case in itertools.product(speed.DTYPES, speed.SIZES["cpu"], speed.CASES)
    ]
    assert max(len(line) for line in tables.speed_lines([asdict(record) for record in wide])) <= 100


def test_contenders_take_turns():
    """Contenders take turns until the end time, and for MIN_ROUNDS rounds at least. prepare runs before each sample."""
    taken = []
    contenders = {n: timing.Contender(partial(taken.append, n), prepare=partial(taken.append, "-")) for n in "ab"}
    times = timing.rounds(contenders, 0.0)
    assert len(times["a"]) == len(times["b"]) == timing.MIN_ROUNDS
    assert taken == ["-", "a", "-", "b"] * timing.MIN_ROUNDS
    end = time.perf_counter() + 0.05
    assert len(timing.rounds(contenders, end)["a"]) > timing.MIN_ROUNDS
    assert time.perf_counter() >= end


@pytest.mark.parametrize(("ns", "calls"), [(2e6, 1), (3e5, 4), (1.0, 64)])
def test_warming_up_chooses_the_calls_of_a_sample(ns, calls):
    """A sample has enough calls for a millisecond, up to the allowed number. Its value is the time per unit."""
    contender = timing.Contender(lambda: None, lambda call, calls: calls * ns, units=5, most=64)
    contender.warm_up()
    assert contender.calls == calls
    assert contender.sample() == pytest.approx(ns / 5)


def test_speed_is_of_neighbours():
    """The speed-up is the median of ratios, not the ratio of medians: samples are compared within their round."""
    found = timing.Speed.of([1.0, 2.0, 30.0], [2.0, 40.0, 30.0])
    assert found.ns.median == 2
    assert found.ratio == pytest.approx((2.0, 1.2, 16.4))
    assert found.samples == 3
    assert timing.Speed.of([1.0, 3.0]).ratio == (1, 1, 1)
    assert found.ns.times(0.5) == pytest.approx([0.5 * x for x in found.ns])


@pytest.fixture(scope="module")
def memory_of_one():
    return measure_memory("cpu", "one dropout, 2^24 floats")


@pytest.mark.parametrize("workload", ["one dropout, 2^24 floats", "TransformerEncoderLayer"])
def test_memory(workload, memory_of_one):
    """nn.Dropout keeps a mask or noise of the input's size. fd.Dropout keeps 16 bytes per dropout."""
    found = memory_of_one if workload.startswith("one") else measure_memory("cpu", workload)
    records = {(r.module, r.checkpointed): r for r in found}
    assert len(records) == 4
    ours, torchs = records["fd.Dropout", False], records["nn.Dropout", False]
    if workload.startswith("one"):
        assert ours.saved == 16
        assert torchs.saved >= 2**24
        assert torchs.peak == -1 or torchs.peak > ours.peak > 0.95 * 2**26  # -1: not available on this system
    assert ours.saved < torchs.saved
    assert records["fd.Dropout", True].saved <= ours.saved


def test_memory_of_lora(monkeypatch):
    """A dropout that is paired with its linear layer keeps only its key. The benchmark itself uses a larger layer."""

    def smaller(p=P):
        return AdaptedLayer(64, 2, 172, p), torch.randn(1, 256, 64)

    monkeypatch.setitem(MEMORY_WORKLOADS, "Llama layer, LoRA", smaller)
    saved = {r.module: r.saved for r in measure_memory("cpu", "Llama layer, LoRA") if not r.checkpointed}
    assert saved["fd, paired"] == saved["p = 0"] + 7 * 16
    assert saved["p = 0"] < saved["fd.Dropout"] < saved["nn.Dropout"]


def test_models():
    records = speed.measure_model("cpu", "MLP 784-512-256-128-10", 0.1, compiled=False)
    assert [r.module for r in records] == ["nn.Dropout", "fd.Dropout", "p = 0"]
    assert records[0].ratio == 1
    assert all(r.seconds > 0 and 0 < r.ratio_p10 <= r.ratio <= r.ratio_p90 for r in records)


@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")
def test_report(result, memory_of_one, tmp_path):
    """One HTML page that includes its pictures, and the same in Markdown with picture files beside it."""
    from fused_dropout.bench.report import write_report

    memory = [asdict(r) for r in memory_of_one]
    models = [asdict(speed.Model("cpu", "a model", name, c, 1.0, 1.0, 0.9, 1.1)) for name, c in MODELS]
    page = write_report(
        {k: v for k, v in result.items() if k != "device"} | {"memory": memory, "model": models}, tmp_path
    ).read_text()
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    expected = [
        "correlation",
        "masks",
        "memory",
        "models",
        "rate",
        "speedup",
        "time",
        *["training"] * bool(result["training"]),
    ]
    assert pictures == [f"cpu-{name}" for name in expected]
    assert page.count("data:image/png;base64,") == 2 * len(pictures)  # light and dark
    assert "http" not in page
    assert all(f"({name}.png)" in (tmp_path / "report.md").read_text() for name in pictures)
