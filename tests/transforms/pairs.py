"""All pairs: a small selection of a table's cells in which each two values of different axes meet."""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any


def every_cell(axes: Sequence[Sequence[Any]]) -> list[tuple]:
    return list(itertools.product(*axes))


def all_pairs(
    axes: Sequence[Sequence[Any]], costly: Sequence[Any] = (), apart: Collection[frozenset] = ()
) -> list[tuple]:
    """Greedy and deterministic. Each cell starts with the first pair that no cell has yet, and takes on each other axis
    the value that adds most new pairs. Where several add as many: none of the costly ones, and the least used. The
    pairs in apart need no cell."""
    numbers = range(len(axes))
    used: Counter[tuple[int, Any]] = Counter()
    missing = {
        ((i, a), (j, b)): None  # a dict, for its order
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
