"""The tables that ``python -m fused_dropout bench`` prints, made of its JSON."""

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]


def power(numel: int) -> str:
    return f"2^{numel.bit_length() - 1}"


def short(value: float) -> str:
    """Three significant digits, and no fewer before the point."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}" if value < 99999.5 else f"{value / 1000:.0f}k"


def mebibytes(nbytes: int) -> str:
    return "not measured" if nbytes < 0 else f"{nbytes:,} B" if nbytes < 2**20 else f"{nbytes / 2**20:,.1f} MiB"


def _speed_cell(r: Record | None) -> str:
    if r is None:
        return f"{'-':>6}{'-':>6}{'-':>7}{'':10}"
    torch_us, fd_us = (short(ns * r["numel"] / 1e3) for ns in (r["torch_ns"], r["fd_ns"]))
    return f"{torch_us:>6}{fd_us:>6}{short(r['ratio']):>6}x {short(r['ratio_p10']) + '-' + short(r['ratio_p90']):<9}"


def speed_lines(records: list[Record]) -> Iterator[str]:
    idle = [r for r in records if r["case"] in ("eval", "p = 0")]
    active = [r for r in records if r not in idle]
    cases = list(dict.fromkeys(r["case"] for r in active))
    if active:
        yield f"Microseconds a call, p = {active[0]['p']}; speed-up = torch / fd: median, 10th-90th percentile\n"
        yield " " * 13 + "".join(f" {' ' + case + ' ':-^27} " for case in cases)
        yield f"{'dtype':9}{'size':4}" + f"{'torch':>6}{'fd':>6}  {'speed-up':<15}" * len(cases)
    found = {(r["dtype"], r["numel"], r["case"]): r for r in active}
    for dtype, numel in dict.fromkeys((r["dtype"], r["numel"]) for r in active):
        yield f"{dtype:9}{power(numel):4}" + "".join(_speed_cell(found.get((dtype, numel, case))) for case in cases)
    for case in dict.fromkeys(r["case"] for r in idle):
        r = next(r for r in idle if r["case"] == case)
        us = f"torch {r['torch_ns'] * r['numel'] / 1e3:.2f}, fd {r['fd_ns'] * r['numel'] / 1e3:.2f}"
        yield f"\nWith {case} ({r['dtype']}, {power(r['numel'])}): {us}, {r['ratio']:.2f}x"


def _rate_lines(records: list[Record]) -> Iterator[str]:
    if records:
        yield f"\nDrop rate over {power(records[0]['draws'])} draws (seed 0), 99 % interval"
    for r in records:
        verdict = "inside" if r["inside"] else "OUTSIDE (1 in 100 is, by chance)"
        yield f"  p = {r['p']}  {r['module']}  {r['rate']:.6f}  [{r['low']:.6f}, {r['high']:.6f}]  p is {verdict}"


def _training_lines(records: list[Record]) -> Iterator[str]:
    for i, r in enumerate(records):
        if i == 0:
            yield f"\nTraining an MLP (64-128-64-10) on digits: dropout 0.2, {r['epochs']} epochs, runs: {r['runs']}"
        accuracy, loss = f"test accuracy {r['accuracy']:.2%}", f"train loss {r['loss']:.4f}"
        yield f"  {r['module']}  {accuracy}  {loss}  {r['seconds']:.2f} s"


def _memory_lines(records: list[Record]) -> Iterator[str]:
    if records:
        yield "\nMemory of a step: kept for backward; peak above what was there before"
    for r in records:
        what = r["workload"] + ", checkpointed" * r["checkpointed"]
        yield f"  {what:48} {r['module']:10} {mebibytes(r['saved']):>12} {mebibytes(r['peak']):>12}"


def _model_lines(records: list[Record]) -> Iterator[str]:
    if records:
        yield "\nA step of a model, forward and backward: milliseconds; times the speed with nn.Dropout"
    for r in records:
        what = r["workload"] + ", compiled" * r["compiled"]
        spread = f"{r['ratio']:.2f}x {r['ratio_p10']:.2f}-{r['ratio_p90']:.2f}"
        yield f"  {what:36} {r['module']:10} {r['seconds'] * 1e3:9.2f}  {spread}"


def describe(result: dict[str, Any]) -> Iterator[str]:
    """The lines for all devices in the result."""
    environment = result["environment"]
    info = environment["backend_info"]
    devices = dict.fromkeys(r["device"] for r in result["speed"])
    kinds = result.keys() - {"environment", "skipped"}
    for device in devices:
        here = {kind: [r for r in result[kind] if r["device"] == device] for kind in kinds}
        yield f"== {device}: {environment['cpu'] if device == 'cpu' else environment['gpus'][0]}"
        yield f"torch {environment['torch']}, {environment['threads']} threads, load {environment['load']} at the start"
        lines = [*speed_lines(here["speed"])]
        for r in here["saved_bytes"]:
            what = f"Saved for backward of {power(r['numel'])} {r['dtype']}s"
            lines.append(f"{what}: torch {r['torch']:,} bytes, fd {r['fd']:,} bytes")
        lines += [*_rate_lines(here["drop_rate"]), *_training_lines(here["training"])]
        lines += [*_memory_lines(here["memory"]), *_model_lines(here["model"]), ""]
        yield from (line.rstrip(" ") for line in lines)
    yield from (f"note: {note}" for note in [*info["notes"], *result.get("skipped", [])])
    served = ", ".join(f"{device}: {info['devices'][device]}" for device in devices)
    yield f"Served by {served}; eager binding: {'yes' if info['eager'] else 'no'}"
