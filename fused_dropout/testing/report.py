"""``Report``: what ``check`` found, as a verdict in words, as rows and as a table."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .statistics import HEADER, Result

# Kinds of faults, and the first words of the names of the tests that find them. The first kind that matches is used.
_KINDS = {
    "output": ("output",),
    "gradient": ("gradient",),
    "calls": ("every shift, long", "every shift, short", "every shift, tiny", "collisions"),
    "rate of calls": ("rate by call",),
    "positions": ("rate by", "rate at"),
    "elements": ("every lag", "every shift", "runs", "blocks"),
    "rate": ("rate",),
    "scale": ("E[y] / x", "Var[y] / x^2", "scale"),
    "backward at zeros": ("backward at zeros",),
    "backward scale": ("backward scale",),
    "checkpoint": ("checkpointed backward",),
    "backward": ("backward", "double backward"),
    "evaluation": ("evaluation",),
    "p = 0": ("p = 0",),
}
# The words for each kind in the verdict. Causes stand before their consequences.
_MEANINGS = {
    "output": "{}",
    "rate": "{}",
    "scale": "the scale is wrong: {}",
    "gradient": "{}",
    "backward": "backward uses another mask than forward",
    "backward at zeros": "backward uses another mask than forward where x is 0",
    "backward scale": "backward scales wrongly: {}",
    "checkpoint": "a checkpoint recomputes another mask than forward's",
    "evaluation": "in evaluation: {}",
    "p = 0": "with p = 0: {}",
    "calls": "calls share masks, or parts of them",
    "rate of calls": "the rate changes from call to call",
    "positions": "some positions are dropped more often than others",
    "elements": "the elements of a mask depend on each other",
}
_ROWS = 5  # of faults in a report


@dataclass(frozen=True)
class Report:
    """What ``check`` found.

    ``results`` holds all tests, ``faults`` those with a p-value below ``alpha``, ``notes`` what is no fault. ``str()``
    gives the verdict, up to five faults and the notes. ``table`` has all tests.
    """

    p: float
    alpha: float
    results: tuple[Result, ...]
    notes: tuple[str, ...]

    @property
    def faults(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.p_value < self.alpha)

    @property
    def verdict(self) -> str:
        """What is wrong, in one line, the cause first; "nothing is wrong" if there are no faults."""
        return "; ".join(self._causes()) or "nothing is wrong"

    @property
    def table(self) -> str:
        """All tests, one a line."""
        lines = [f"p = {self.p:g}; alarm at a p-value below {self.alpha:.0e}", HEADER]
        faults = self.faults
        return "\n".join(lines + [f"{result}{'  <- WRONG' * (result in faults)}" for result in self.results])

    def _causes(self) -> dict[str, Result]:
        """What is wrong, in words, and the result with the smallest p-value for each. Causes come first, and their
        consequences are left out."""
        found: dict[str, Result] = {}
        for result in self.faults:
            kind = next(kind for kind, names in _KINDS.items() if result.test.startswith(names))
            if kind == "calls" and " at shift 0, " in result.detail:
                kind = "elements"  # the correlation is within one call
            found[kind] = min(found.get(kind, result), result, key=lambda r: r.p_value)
        for kind in self._consequences(found):
            found.pop(kind, None)
        return {words.format(found[kind].detail): found[kind] for kind, words in _MEANINGS.items() if kind in found}

    def _consequences(self, found: dict[str, Result]) -> Iterator[str]:
        """The kinds of faults that follow from others."""
        measured = self.p
        if off := found.get("rate"):
            measured += off.statistic * math.sqrt(self.p * (1 - self.p) / off.n)
            yield from ("scale", "backward scale")  # their tests expect 1 / (1 - p) for the given p
        if "scale" in found or "backward" in found:
            yield "backward scale"
        if not 1e-9 < measured < 1 - 1e-9:  # the mask is constant
            yield from ("calls", "rate of calls", "positions", "elements", "backward at zeros")
        elif "calls" in found or "elements" in found:
            # The tests of rates assume independent draws, and those of calls independent elements.
            yield from ("rate of calls", "backward at zeros")
            if "positions" in found and not any(map(_is_strong, self.faults)):
                yield from ("calls", "elements")  # different rates by position correlate calls and elements
            else:
                yield "positions"
                yield from ["calls"] * ("elements" in found)
            if abs(measured - self.p) < 0.05:
                yield "rate"
        if "backward" in found:
            yield from ("backward at zeros", "checkpoint")

    def __str__(self) -> str:
        if not self.faults:
            lines = [f"p = {self.p:g}: nothing is wrong ({len(self.results)} tests)"]
        else:
            lines = [f"p = {self.p:g}: WRONG: {self.verdict}"]
            shown = [result for words, result in self._causes().items() if result.detail not in words]
            lines += [f"  {result.test}: {result.detail}" for result in shown[:_ROWS]]
            lines.append(f"  {len(self.faults)} of {len(self.results)} tests fail")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def described(error: BaseException) -> str:
    """An error in one line: its class, and the first line of its message."""
    message = (str(error).splitlines() or [""])[0][:200]
    return type(error).__name__ + (message and f": {message}")


def _is_strong(result: Result) -> bool:
    """Whether the test found a correlation near 1."""
    return result.test.startswith(("every shift", "every lag")) and abs(result.statistic) > 0.5 * math.sqrt(result.n)
