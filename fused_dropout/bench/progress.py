"""Shows the progress of a long run on standard error."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

_SECONDS = 10  # between two lines

T = TypeVar("T")


def progress(items: Sequence[T], label: str | Callable[[T], str]) -> Iterator[T]:
    """Yields the items, and shows how many are done: by tqdm's bar on a terminal, else by a line each ten seconds."""
    text = (lambda _: label) if isinstance(label, str) else label
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        tqdm = None
    if tqdm is not None and sys.stderr.isatty():
        with tqdm(items, leave=False, bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left") as bar:
            for item in bar:
                bar.set_description_str(f"{text(item):36}")
                yield item
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said >= _SECONDS:
            said = time.monotonic()
            print(f"{done} of {len(items)} done, now {text(item)}", file=sys.stderr, flush=True)
        yield item
