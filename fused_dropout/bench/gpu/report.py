"""The records of ``python -m fused_dropout gpu-check``, and its report: JSON, Markdown, and plots with matplotlib.

A report is the dictionary in the JSON file: "machine", "options", and for each name in KINDS a list of records.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from ..tables import Record, power, short

COPY = "copy"
_MACHINE = ("date", "torch", "cuda", "driver", "triton", "python", "platform", "cpu", "fused_dropout")


@dataclass(frozen=True)
class Check:
    name: str
    result: str  # "passed", "failed" or "skipped"
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.result:8}{self.seconds:6.1f} s  {self.name}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Bandwidth:
    case: str
    dtype: str
    numel: int
    implementation: str
    us: float  # microseconds of a call: median, 10th and 90th percentile of the samples
    us_p10: float
    us_p90: float
    gb_s: float  # the bytes that a copy reads and writes / the median time
    of_copy: float  # the copy's time / this one's in the same round; both in a graph or neither
    of_copy_p10: float
    of_copy_p90: float
    samples: int
    buffers: int  # how many buffers the calls used in turn

    def __str__(self) -> str:
        what = f"{self.case}, {self.dtype}, {power(self.numel)}, {self.implementation}"
        return f"{what}: {short(self.us)} us, {self.gb_s:.0f} GB/s, {self.of_copy:.3f} of the copy's"


@dataclass(frozen=True)
class HostTime:
    case: str
    implementation: str
    us: float
    us_p10: float
    us_p90: float

    def __str__(self) -> str:
        return f"host time, {self.case}, {self.implementation}: {short(self.us)} us"


@dataclass(frozen=True)
class Step:
    block: str
    implementation: str  # "nn.Dropout", "fd.Dropout" or "p = 0"
    ms: float
    ms_p10: float
    ms_p90: float
    peak_mib: float  # peak memory above that before the step

    def __str__(self) -> str:
        return f"block, {self.block}, {self.implementation}: {short(self.ms)} ms, peak {self.peak_mib:.0f} MiB"


@dataclass(frozen=True)
class Overlap:
    implementation: str
    dtype: str
    numel: int
    noise: float  # the standard deviation of the correlation of independent masks
    correlations: dict[str, float]  # the correlation for each shift

    def __str__(self) -> str:
        at, most = largest_of(self.correlations)
        return f"overlap, {self.implementation}, {self.dtype}, {power(self.numel)}: {most:+.4f} at shift {at}"


@dataclass(frozen=True)
class Clocks:
    when: str
    nvidia_smi: dict[str, str]

    def __str__(self) -> str:
        return f"clocks {self.when}: " + (", ".join(self.nvidia_smi.values()) or "no nvidia-smi")


@dataclass(frozen=True)
class Note:
    text: str

    def __str__(self) -> str:
        return f"note: {self.text}"


Recorded = Check | Bandwidth | HostTime | Step | Overlap | Clocks | Note
KINDS: dict[str, type] = {
    "check": Check,
    "speed": Bandwidth,
    "hosttime": HostTime,
    "step": Step,
    "overlap": Overlap,
    "clocks": Clocks,
    "note": Note,
}


def kind_of(record: Recorded) -> str:
    return next(name for name, kind in KINDS.items() if type(record) is kind)


def largest_of(correlations: dict[str, float]) -> tuple[str, float]:
    return max(correlations.items(), key=lambda item: abs(item[1]))


def failed(report: dict[str, Any]) -> list[Record]:
    return [check for check in report["check"] if check["result"] == "failed"]


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""


def _interval(record: Record | None, unit: str) -> str:
    """The median, and the 10th to 90th percentile."""
    if record is None:
        return ""
    median, p10, p90 = (short(record[name]) for name in (unit, f"{unit}_p10", f"{unit}_p90"))
    return f"{median} ({p10}-{p90})"


def _share(record: Record | None) -> str:
    return (
        "" if record is None else f"{record['of_copy']:.3f} ({record['of_copy_p10']:.3f}-{record['of_copy_p90']:.3f})"
    )


def _names(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record["implementation"] for record in records))


def _speed_tables(speeds: Sequence[Record]) -> Iterator[str]:
    for case in dict.fromkeys(record["case"] for record in speeds):
        of_case = sorted((r for r in speeds if r["case"] == case), key=lambda r: (r["dtype"], r["numel"]))
        names = _names(of_case)
        rows = []
        for (dtype, numel), group in groupby(of_case, key=lambda r: (r["dtype"], r["numel"])):
            found = {record["implementation"]: record for record in group}
            cells = [_interval(found.get(name), "us") for name in names]
            rows.append([dtype, power(numel), *cells, *(_share(found.get(name)) for name in ("fd", "fd, graph"))])
        yield f"### {case.capitalize()}\n"
        yield "Microseconds a call, and fd's share of the copy's bandwidth: median (10th-90th percentile).\n"
        yield from _table(["dtype", "elements", *names, "fd / copy", "fd, graph / copy, graph"], rows)


def _overlap_rows(overlaps: Sequence[Record]) -> Iterator[list[str]]:
    for r in overlaps:
        at, most = largest_of(r["correlations"])
        figures = " ".join(f"{value:+.4f}" for value in r["correlations"].values())
        yield [r["implementation"], r["dtype"], power(r["numel"]), f"{most:+.4f}", at, f"{r['noise']:.4f}", figures]


def _sections(report: dict[str, Any], plots: Sequence[Path]) -> Iterator[str]:
    machine, options = report["machine"], report["options"]
    yield f"# {machine['gpu']['name']}, torch {machine['torch']}\n"
    yield f"`python -m fused_dropout gpu-check`, {options['seconds']:.0f} s{', quick' * options['quick']}.\n"
    rows = [[name, machine[name]] for name in _MACHINE if machine.get(name)]
    rows += [[name, value] for name, value in machine["gpu"].items() if name != "name"]
    for clocks in report["clocks"]:
        rows += [[f"{name}, {clocks['when']}", value] for name, value in clocks["nvidia_smi"].items()]
    yield from _table(["", ""], rows)
    yield "## Checks\n"
    yield from _table(["", "check", ""], ((r["result"], r["name"], r["detail"]) for r in report["check"]))
    if report["speed"]:
        yield "## Speed\n"
        yield from (f"![{plot.stem}]({plot.name})\n" for plot in plots)
        yield from _speed_tables(report["speed"])
    if report["hosttime"]:
        yield "## Host time of a call of 64 floats\n"
        cells = ([r["case"], r["implementation"], _interval(r, "us")] for r in report["hosttime"])
        yield from _table(["", "", "microseconds: median (10th-90th percentile)"], cells)
    if report["step"]:
        yield "## A transformer block, forward + backward\n"
        yield "Milliseconds: median (10th-90th percentile). Memory: the peak above what there was before the step.\n"
        cells = ([r["block"], r["implementation"], _interval(r, "ms"), f"{r['peak_mib']:.0f}"] for r in report["step"])
        yield from _table(["block", "dropout", "ms", "MiB"], cells)
    if report["overlap"]:
        yield "## Masks of consecutive calls\n"
        yield "Correlation of element i of a call's mask with element i + shift of the mask of the call before it: 0 if"
        yield "they are independent, 0.5 if half of the draws are the same. Noise: their standard deviation then.\n"
        header = ["", "dtype", "elements", "largest", "at shift", "noise", "shifts " + _range(report["overlap"][0])]
        yield from _table(header, _overlap_rows(report["overlap"]))
    if report["note"]:
        yield "## Notes\n"
        yield from (f"- {note['text']}" for note in report["note"])


def _range(overlap: Record) -> str:
    shifts = list(overlap["correlations"])
    return f"{shifts[0]} to {shifts[-1]}"


def markdown(report: dict[str, Any], plots: Sequence[Path] = ()) -> str:
    return "\n".join(_sections(report, plots)).rstrip("\n") + "\n"


def summary(report: dict[str, Any]) -> Iterator[str]:
    """The lines that are printed at the end."""
    results = [check["result"] for check in report["check"]]
    yield "Checks: " + ", ".join(f"{results.count(result)} {result}" for result in ("passed", "failed", "skipped"))
    yield from (f"  failed: {check['name']}: {check['detail']}" for check in failed(report))
    ours = [r for r in report["speed"] if r["implementation"] in ("fd", "fd, graph") and r["numel"] >= 2**20]
    ours.sort(key=lambda r: (r["case"], r["dtype"], r["implementation"], r["numel"]))
    for (case, dtype, name), group in groupby(ours, key=lambda r: (r["case"], r["dtype"], r["implementation"])):
        shares = ", ".join(f"{power(r['numel'])} {r['of_copy']:.3f}" for r in group)
        yield f"{case}, {dtype}, {name}, of the copy's bandwidth: {shares}"
    yield from (str(HostTime(**r)) for r in report["hosttime"])
    yield from (str(Step(**r)) for r in report["step"])


def _plot(speeds: Sequence[Record], case: str, path: Path) -> None:
    from matplotlib.figure import Figure

    of_case = sorted((r for r in speeds if r["case"] == case), key=lambda r: r["numel"])
    dtypes, names = list(dict.fromkeys(record["dtype"] for record in of_case)), _names(of_case)
    figure = Figure(figsize=(4.5 * len(dtypes) + 2, 4), layout="constrained")
    axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        for i, name in enumerate(names):
            points = [r for r in of_case if r["dtype"] == dtype and r["implementation"] == name]
            style = {"color": "black", "linewidth": 2.5} if name == COPY else {"color": f"C{i}", "marker": "."}
            axis.plot([r["numel"] for r in points], [r["gb_s"] for r in points], label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set(title=f"{case}, {dtype}", xlabel="elements")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path)


def plot(report: dict[str, Any], path: Path) -> list[Path]:
    """Plots bandwidth against size: a file for each case, and a line for each implementation and for the copy."""
    plots = []
    for case in dict.fromkeys(record["case"] for record in report["speed"]):
        plots.append(path.with_name(f"{path.stem}-{case.replace(' + ', '-').replace(' ', '-')}.svg"))
        _plot(report["speed"], case, plots[-1])
    return plots


def write(report: dict[str, Any], path: Path) -> list[Path]:
    """Writes the files and returns their paths. Writes the JSON first, so that a later error cannot lose it."""
    path.write_text(json.dumps(report, indent=1) + "\n")
    plots = []
    if find_spec("matplotlib") is None:
        report["note"].append({"text": "no plots: there is no matplotlib"})
    else:
        try:
            plots = plot(report, path)
        except Exception as error:
            report["note"].append({"text": f"no plots: {error!r}"})
    page = path.parent / f"{path.stem}.md"
    page.write_text(markdown(report, plots))
    return [path, page, *plots]
