"""Formats the results of ``python -m fused_dropout bench`` as the tables that it prints."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

Record = dict[str, Any]

# A free machine gives a share above 0.98. If another program keeps one of two cores busy, the share is 0.6 to 0.7, and
# some speed-ups are wrong by a factor of ten.
TRUSTED_CPU_SHARE = 0.9


def power(numel: int) -> str:
    return f"2^{numel.bit_length() - 1}"


def short(value: float) -> str:
    """A number with three significant digits, or all digits before the point if these are more."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}" if value < 99999.5 else f"{value / 1000:.0f}k"


def mebibytes(nbytes: int) -> str:
    return f"{nbytes:,} B" if nbytes < 2**20 else f"{nbytes / 2**20:,.1f} MiB"


def _spread(r: Record) -> str:
    """Half the range from the 10th to the 90th percentile, in per cent of the median, with two significant digits."""
    percent = float(f"{50 * (r['ratio_p90'] - r['ratio_p10']) / r['ratio']:.2g}")
    return f"±{percent:.{0 if percent >= 10 else 1 if percent >= 1 else 2}f} %"


def busy(cpu_shares: Sequence[float]) -> Iterator[str]:
    """The lines of a warning, if other programs use so much CPU time that the results cannot be trusted."""
    if (share := fmean(cpu_shares)) < TRUSTED_CPU_SHARE:
        yield f"WARNING: the machine is busy: the benchmark gets {100 * share:.0f} % of the CPU time that it needs."
        yield "Do not trust the times and speed-ups. Stop other programs, or use fewer threads (--threads)."


def _speed_cell(r: Record | None) -> str:
    if r is None:
        return f"{'-':>6}{'-':>6}{'-':>7}{'':10}"
    torch_us, fd_us = (short(ns * r["numel"] / 1e3) for ns in (r["torch_ns"], r["fd_ns"]))
    return f"{torch_us:>6}{fd_us:>6}{short(r['ratio']):>6}x {_spread(r):<9}"


def speed_lines(records: list[Record]) -> Iterator[str]:
    idle = [r for r in records if r["case"] in ("eval", "p = 0")]
    active = [r for r in records if r not in idle]
    cases = list(dict.fromkeys(r["case"] for r in active))
    if active:
        yield f"\nMicroseconds a call at p = {active[0]['p']}: torch is nn.Dropout, fd is fd.Dropout."
        yield "Speed-up: torch / fd, median of neighbouring samples ± half the range of the middle 80 %.\n"
        yield " " * 13 + "".join(f" {' ' + case + ' ':-^27} " for case in cases)
        yield f"{'dtype':9}{'size':4}" + f"{'torch':>6}{'fd':>6}  {'speed-up':<15}" * len(cases)
    found = {(r["dtype"], r["numel"], r["case"]): r for r in active}
    for dtype, numel in dict.fromkeys((r["dtype"], r["numel"]) for r in active):
        yield f"{dtype:9}{power(numel):4}" + "".join(_speed_cell(found.get((dtype, numel, case))) for case in cases)
    for case in dict.fromkeys(r["case"] for r in idle):
        r = next(r for r in idle if r["case"] == case)
        us = f"torch {r['torch_ns'] * r['numel'] / 1e3:.2f}, fd {r['fd_ns'] * r['numel'] / 1e3:.2f}"
        state = "eval()" if case == "eval" else case
        yield f"\nWith {state} ({r['dtype']}, {power(r['numel'])}): {us}, {r['ratio']:.2f}x"


def _rate_lines(records: list[Record]) -> Iterator[str]:
    if records:
        yield f"\nDrop rate over {power(records[0]['draws'])} draws (seed 0), and its 99 % confidence interval"
    for r in records:
        verdict = "contains p" if r["inside"] else "does NOT contain p (1 in 100 does not, by chance)"
        yield f"  p = {r['p']}  {r['module']}  {r['rate']:.6f}  [{r['low']:.6f}, {r['high']:.6f}]  {verdict}"


def _training_lines(records: list[Record]) -> Iterator[str]:
    for i, r in enumerate(records):
        if i == 0:
            yield f"\nTraining an MLP (64-128-64-10) on digits: dropout 0.2, {r['epochs']} epochs, runs: {r['runs']}"
        accuracy, loss = f"test accuracy {r['accuracy']:.2%}", f"train loss {r['loss']:.4f}"
        yield f"  {r['module']}  {accuracy}  {loss}  {r['seconds']:.2f} s a run"


def _memory_lines(records: list[Record]) -> Iterator[str]:
    if records:
        yield "\nMemory of a step: kept for backward; peak above what was there before"
    for r in records:
        what = r["workload"] + ", checkpointed" * r["checkpointed"]
        yield f"  {what:48} {r['module']:10} {mebibytes(r['saved']):>12} {mebibytes(r['peak']):>12}"


def _model_lines(records: list[Record]) -> Iterator[str]:
    if records:
        yield "\nA step of a model, forward and backward: milliseconds; times the speed with nn.Dropout, ± as above"
    for r in records:
        what = r["workload"] + ", compiled" * r["compiled"]
        ratio = "" if r["module"] == "nn.Dropout" else f"  {r['ratio']:.2f}x {_spread(r)}"
        yield f"  {what:36} {r['module']:10} {r['seconds'] * 1e3:9.2f}{ratio}"


def describe(result: dict[str, Any]) -> Iterator[str]:
    """The lines of the tables for all devices in the result."""
    environment = result["environment"]
    info = environment["backend_info"]
    devices = dict.fromkeys(r["device"] for r in result["speed"])
    kinds = result.keys() - {"environment", "skipped", "cpu_shares"}
    for device in devices:
        here = {kind: [r for r in result[kind] if r["device"] == device] for kind in kinds}
        yield f"== {device}: {environment['cpu'] if device == 'cpu' else environment['gpus'][0]}"
        share = f"{100 * fmean(result['cpu_shares']):.0f} % of the CPU time they needed"
        yield f"torch {environment['torch']}, threads: {environment['threads']}, which got {share}"
        lines = [*speed_lines(here["speed"])]
        for r in here["saved_bytes"]:
            what = f"\nSaved for backward by one dropout of {power(r['numel'])} {r['dtype']} elements"
            lines.append(f"{what}: torch {r['torch']:,} bytes, fd {r['fd']:,} bytes")
        lines += [*_rate_lines(here["drop_rate"]), *_training_lines(here["training"])]
        lines += [*_memory_lines(here["memory"]), *_model_lines(here["model"]), ""]
        yield from (line.rstrip(" ") for line in lines)
    yield from (f"note: {note}" for note in [*info["notes"], *result.get("skipped", [])])
    served = ", ".join(f"{device}: {info['devices'][device]}" for device in devices)
    yield f"Served by {served}; eager binding: {'yes' if info['eager'] else 'no'}"
    yield from busy(result["cpu_shares"])
