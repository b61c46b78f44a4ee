"""All-pairs testing: a small selection of a table's cells in which each two values of different axes occur together."""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any


def every_cell(axes: Sequence[Sequence[Any]]) -> list[tuple]:
    return list(itertools.product(*axes))


def all_pairs(
    axes: Sequence[Sequence[Any]], costly: Sequence[Any] = (), apart: Collection[frozenset] = ()
) -> list[tuple]:
    """A greedy and deterministic selection.

    Each cell starts with the first pair that no cell has yet. On each other axis it takes the value that adds most new
    pairs. If several values add equally many, it avoids the costly ones and takes the least used. The pairs in apart
    need no cell.
    """
    numbers = range(len(axes))
    used: Counter[tuple[int, Any]] = Counter()
    missing = {
        ((i, a), (j, b)): None  # a dict keeps the order
        for i, j in itertools.combinations(numbers, 2)
        for a in axes[i]
        for b in axes[j]
        if frozenset((a, b)) not in apart
    }
    cells = []
    while missing:
        cell = dict(next(iter(missing)))
        for i in numbers:
            if i not in cell:

                def worth(value, i=i, cell=cell):
                    new = sum(tuple(sorted([(i, value), chosen])) in missing for chosen in cell.items())
                    return new, value not in costly, -used[i, value]

                cell[i] = max(axes[i], key=worth)
        used.update(cell.items())
        for pair in itertools.combinations(sorted(cell.items()), 2):
            missing.pop(pair, None)
        cells.append(tuple(cell[i] for i in numbers))
    return cells
