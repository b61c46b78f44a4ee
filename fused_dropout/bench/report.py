"""``python -m fused_dropout bench --report DIR``: writes a self-contained HTML page with plots, and Markdown.

Each plot is drawn twice, for a light and a dark background. The colours are those of Okabe and Ito, which colour-blind
readers can distinguish.
"""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..modules import Dropout
from ..testing.statistics import correlations
from .tables import Record, busy, describe, mebibytes

TORCH, OURS, PAIRED, FLOOR = "#D55E00", "#0072B2", "#009E73", "#999999"
COLOURS = {"nn.Dropout": TORCH, "fd.Dropout": OURS, "fd, paired": PAIRED, "fd, patched": PAIRED, "p = 0": FLOOR}
THEMES = {"light": ("#ffffff", "#222222"), "dark": ("#16181d", "#dddddd")}
SIDE, LAGS = 96, 2**20

Result = dict[str, Any]
Plot = Callable[[Result, str], Figure | None]


def _figure(columns: int, width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _pick(result: Result, kind: str, **wanted: object) -> list[Record]:
    return [r for r in result[kind] if all(r[name] == value for name, value in wanted.items())]


def _legend_below(figure: Figure, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))


def _ink() -> str:
    """The colour of text in the theme that is drawn."""
    return str(matplotlib.rcParams["text.color"])


def _error_bars(records: list[Record]) -> list[list[float]]:
    """The distances of the 10th and 90th percentiles from the medians, in matplotlib's form for error bars."""
    below = [max(0, r["ratio"] - r["ratio_p10"]) for r in records]
    return [below, [max(0, r["ratio_p90"] - r["ratio"]) for r in records]]


def plot_time(result: Result, device: str) -> Figure | None:
    """Nanoseconds an element against size. The lower limit is an operation that moves the same bytes."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in _pick(result, "speed", device=device, case="forward")))
    if not dtypes:
        return None
    figure, axes = _figure(len(dtypes), 3.4 * len(dtypes), 3.2)
    floor = "multiply" if device == "cpu" else "copy"
    for axis, dtype in zip(axes, dtypes, strict=True):
        records = sorted(_pick(result, "speed", device=device, case="forward", dtype=dtype), key=lambda r: r["numel"])
        sizes = [r["numel"] for r in records]
        for name, field, colour, marker in (
            ("nn.Dropout", "torch_ns", TORCH, "o"),
            ("fd.Dropout", "fd_ns", OURS, "s"),
            (floor, "floor_ns", FLOOR, "^"),
        ):
            axis.loglog(sizes, [r[field] for r in records], color=colour, marker=marker, markersize=4, label=name)
        axis.set_xscale("log", base=2)
        axis.set(title=dtype, xlabel="elements")
    axes[0].set_ylabel("ns an element, forward")
    for axis in axes[1:]:
        axis.sharey(axes[0])
    _legend_below(figure, axes[0])
    return figure


def plot_speedup(result: Result, device: str) -> Figure | None:
    """Speed relative to nn.Dropout: the median as a bar, and the 10th to 90th percentile as a line."""
    cases = list(dict.fromkeys(r["case"] for r in _pick(result, "speed", device=device)))
    cases = [case for case in cases if case not in ("eval", "p = 0")]
    if not cases:
        return None
    figure, axes = _figure(len(cases), 3.4 * len(cases), 3.6)
    shades = {"float32": OURS, "bfloat16": "#56B4E9", "float16": "#009E73"}
    for axis, case in zip(axes, cases, strict=True):
        records = _pick(result, "speed", device=device, case=case)
        sizes = sorted({r["numel"] for r in records})
        for i, (dtype, colour) in enumerate(shades.items()):
            of = {r["numel"]: r for r in records if r["dtype"] == dtype}
            there = [n for n in sizes if n in of]
            heights = [of[n]["ratio"] for n in there]
            spread = _error_bars([of[n] for n in there])
            places = [sizes.index(n) + (i - 1) * 0.27 for n in there]
            axis.bar(places, heights, 0.25, color=colour, yerr=spread, ecolor=_ink(), label=dtype)
        axis.axhline(1, color="#888888", linewidth=1)
        labelled = range(0, len(sizes), 2)
        axis.set_xticks(labelled, [f"$2^{{{sizes[i].bit_length() - 1}}}$" for i in labelled])
        axis.set(title=case, xlabel="elements")
    axes[0].set_ylabel("times the speed of nn.Dropout")
    _legend_below(figure, axes[0])
    return figure


def plot_memory(result: Result, device: str) -> Figure | None:
    records = _pick(result, "memory", device=device, checkpointed=False)
    if not records:
        return None
    workloads = list(dict.fromkeys(r["workload"] for r in records))
    names = [name for name in COLOURS if any(r["module"] == name for r in records)]
    figure, axes = _figure(2, 10, 1.0 + 0.4 * len(names) * len(workloads))
    for axis, field, title in zip(axes, ("saved", "peak"), ("kept for backward", "peak of a step"), strict=True):
        for i, name in enumerate(names):
            of = {r["workload"]: r[field] for r in records if r["module"] == name}
            places = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j, w in enumerate(workloads) if w in of]
            heights = [of[w] / 2**20 for w in workloads if w in of]
            bars = axis.barh(places, heights, 0.75 / len(names), color=COLOURS[name], label=name)
            axis.bar_label(bars, [mebibytes(of[w]) for w in workloads if w in of], padding=3, fontsize="small")
        axis.set_yticks(range(len(workloads)), workloads if axis is axes[0] else [])
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set(title=title, xlabel="MiB")
    _legend_below(figure, axes[1])
    return figure


def plot_models(result: Result, device: str) -> Figure | None:
    records = _pick(result, "model", device=device)
    if not records:
        return None
    figure, axes = _figure(2, 10, 3.6)
    workloads = list(dict.fromkeys(r["workload"] for r in records))
    for axis, compiled in zip(axes, (False, True), strict=True):
        here = [r for r in records if r["compiled"] == compiled]
        for i, name in enumerate(("fd.Dropout", "fd, patched", "p = 0")):
            of = [r for r in here if r["module"] == name]
            if not of:
                continue
            spread = _error_bars(of)
            places = [workloads.index(r["workload"]) + (i - 1) * 0.28 for r in of]
            axis.barh(
                places, [r["ratio"] for r in of], 0.26, color=COLOURS[name], xerr=spread, ecolor=_ink(), label=name
            )
        axis.axvline(1, color=TORCH, linewidth=1.5, label="nn.Dropout")
        axis.set_yticks(range(len(workloads)), workloads if axis is axes[0] else [])
        axis.set_ylim(len(workloads) - 0.5, -0.5)
        axis.set(title="compiled" if compiled else "eager", xlabel="times the speed with nn.Dropout")
    _legend_below(figure, axes[0])
    return figure


def plot_rate(result: Result, device: str) -> Figure | None:
    """The measured drop rate minus p, with its 99 % interval."""
    records = _pick(result, "drop_rate", device=device)
    if not records:
        return None
    figure, axes = _figure(1, 6, 0.8 + 0.45 * len(records))
    for i, r in enumerate(records):
        low, high = r["rate"] - r["low"], r["high"] - r["rate"]
        axes[0].errorbar(
            (r["rate"] - r["p"]) * 1e6,
            i,
            xerr=[[low * 1e6], [high * 1e6]],
            fmt="o",
            color=COLOURS[r["module"]],
            capsize=4,
        )
    axes[0].axvline(0, color="#888888", linewidth=1)
    axes[0].set_yticks(range(len(records)), [f"{r['module']}, p = {r['p']}" for r in records])
    axes[0].invert_yaxis()
    axes[0].set(xlabel="measured rate less p, in millionths")
    return figure


def _mask(module: type[nn.Module], numel: int, device: str, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return (module(0.5)(torch.ones(numel, device=device)) != 0).float().cpu()


def plot_masks(_result: Result, device: str) -> Figure | None:
    figure, axes = _figure(2, 7, 3.6)
    for axis, (name, module) in zip(axes, (("nn.Dropout", nn.Dropout), ("fd.Dropout", Dropout)), strict=True):
        axis.imshow(_mask(module, SIDE * SIDE, device).view(SIDE, SIDE), cmap="gray", interpolation="nearest")
        axis.set(title=name, xlabel="column", ylabel="row")
    return figure


def plot_correlation(_result: Result, device: str) -> Figure | None:
    """The autocorrelation of one mask at all lags. The largest of this many normal numbers is near 5."""
    figure, axes = _figure(2, 9, 3)
    for axis, (name, module) in zip(axes, (("nn.Dropout", nn.Dropout), ("fd.Dropout", Dropout)), strict=True):
        z = correlations(_mask(module, LAGS, device))[0][1 : LAGS // 2] * LAGS**0.5  # in standard deviations
        height = z[: len(z) // 512 * 512].view(512, -1).abs().amax(1)
        axis.fill_between(range(0, 512 * 1024, 1024), height, color=COLOURS[name], step="post")
        axis.set(title=f"{name}: largest {z.abs().max():.2f}", xlabel="lag (largest of each 1,023)", ylim=(0, 7))
    axes[0].set_ylabel("|correlation|, standard deviations")
    return figure


def plot_training(result: Result, device: str) -> Figure | None:
    records = _pick(result, "training", device=device)
    if not records:
        return None
    figure, axes = _figure(1, 5.5, 3.4)
    for r, style in zip(records, ("-", "--"), strict=True):
        axes[0].plot(range(1, len(r["curve"]) + 1), r["curve"], style, color=COLOURS[r["module"]], label=r["module"])
    axes[0].set(xlabel="epoch", ylabel="training loss, with dropout", yscale="log")
    axes[0].legend(frameon=False)
    return figure


PLOTS: dict[str, tuple[str, str, Plot]] = {  # heading, how to read it, plot
    "time": (
        "Time of an element",
        "Forward calls; lower is better. Grey is about the limit: a plain multiplication, or on a GPU a copy.",
        plot_time,
    ),
    "speedup": (
        "Against nn.Dropout",
        "Higher is better; 1 is equal speed. Bars: medians. Thin lines: from the 10th to the 90th percentile.",
        plot_speedup,
    ),
    "models": (
        "Whole models",
        "A training step; higher is better. With p = 0 nothing is dropped: no dropout can gain much more.",
        plot_models,
    ),
    "memory": (
        "Memory",
        "What autograd keeps from forward to backward, and how far memory rises in a step; lower is better.",
        plot_memory,
    ),
    "rate": (
        "Drop rate",
        "With 99 % confidence intervals. One interval in a hundred misses 0 by chance.",
        plot_rate,
    ),
    "masks": (
        "Two masks, p = 0.5",
        "Kept elements are white. Neither mask should show a pattern.",
        plot_masks,
    ),
    "correlation": (
        "Correlation of a mask with itself, all lags",
        "Of so many lags of a random mask, the largest is near 5 standard deviations.",
        plot_correlation,
    ),
    "training": (
        "Training on digits",
        "The loss of the same network with either dropout: the curves should lie on each other.",
        plot_training,
    ),
}


def draw(plot: Plot, result: Result, device: str, theme: str, font_size: int = 9) -> bytes | None:
    """The plot as a PNG; None if the result has nothing to show in it."""
    background, ink = THEMES[theme]
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    colours: dict[Any, Any] = dict.fromkeys(names, ink)
    colours |= dict.fromkeys(("figure.facecolor", "axes.facecolor"), background)
    with matplotlib.rc_context({**colours, "font.size": font_size, "axes.titlesize": font_size + 1}):
        figure = plot(result, device)
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def write_report(result: Result, folder: Path) -> Path:
    """Writes report.html (self-contained), report.md and its plots. Returns the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(describe(result))
    environment = result["environment"]
    title = f"fused_dropout {environment['fused_dropout']}, torch {environment['torch']}, {environment['date'][:10]}"
    page, markdown = [], [f"# {title}\n"]
    if warning := " ".join(busy(result["cpu_shares"])):
        page.append(f"<p><b>{warning}</b></p>")
        markdown.append(f"**{warning}**\n")
    for device in dict.fromkeys(r["device"] for r in result["speed"]):
        machine = environment["cpu"] if device == "cpu" else environment["gpus"][0]
        page.append(f"<h2>{html.escape(f'{device}: {machine}')}</h2>")
        markdown.append(f"## {device}: {machine}\n")
        for name, (heading, caption, plot) in PLOTS.items():
            light, dark = (draw(plot, result, device, theme) for theme in THEMES)
            if light is None or dark is None:
                continue
            (folder / f"{device}-{name}.png").write_bytes(light)
            markdown.append(f"### {heading}\n\n{caption}\n\n![{heading}]({device}-{name}.png)\n")
            sources = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)]
            page.append(
                f"<h3>{heading}</h3><p>{caption}</p>"
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
                f'<img alt="{heading}" src="{sources[0]}"></picture>'
            )
    style = (
        ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;"
        "padding:0 1rem;background:light-dark(#fff,#16181d);color:light-dark(#222,#ddd)}img{max-width:100%}"
        "pre{overflow-x:auto;font-size:12px}"
    )
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *page, f"<h2>All numbers</h2><pre>{html.escape(text)}</pre>"])
    document = (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>\n{body}\n'
    )
    path = folder / "report.html"
    path.write_text(document)
    (folder / "report.md").write_text("\n".join([*markdown, f"```\n{text}\n```\n"]))
    return path
