"""Which items share a group: partitions into groups of one size, by the cost of every group."""

from collections.abc import Callable, Iterator
from itertools import combinations
from math import factorial

# All partitions are compared up to this many, beyond that a search finds a good one.
MOST_PARTITIONS = 400
SEARCH_SWEEPS = 4

Group = tuple[int, ...]


def best_partition(cost: Callable[[Group], float], count: int, size: int) -> tuple[Group, ...]:
    """0 ... count - 1 in groups of `size`, each in rising order, of least summed cost.

    All partitions are compared where they are few. Else groups are filled greedily, and then two
    members of different groups change places for as long as that helps.
    """
    groups = count // size
    if factorial(count) // (factorial(size) ** groups * factorial(groups)) <= MOST_PARTITIONS:
        return min(_partitions(tuple(range(count)), size), key=lambda p: sum(map(cost, p)))
    free = list(range(count))
    found: list[Group] = []
    while free:
        group: Group = (free.pop(0),)
        while len(group) < size:
            group = min((tuple(sorted((*group, other))) for other in free), key=cost)
            free = [other for other in free if other not in group]
        found.append(group)
    for _ in range(SEARCH_SWEEPS):
        if not any([_swap(found, a, b, cost) for a in range(groups) for b in range(a)]):
            break
    return tuple(sorted(found))


def _swap(found: list[Group], a: int, b: int, cost: Callable[[Group], float]) -> bool:
    """Whether groups a and b got better by the best exchange of one member, which is then made."""
    best, now = None, cost(found[a]) + cost(found[b])
    least = now * (1 - 1e-9)
    for x in found[a]:
        for y in found[b]:
            pair = tuple(
                tuple(sorted({*found[i], new} - {old})) for i, old, new in ((a, x, y), (b, y, x))
            )
            if cost(pair[0]) + cost(pair[1]) < least:
                best, least = pair, cost(pair[0]) + cost(pair[1])
    if best is not None:
        found[a], found[b] = best
    return best is not None


def _partitions(items: Group, size: int) -> Iterator[tuple[Group, ...]]:
    if not items:
        yield ()
        return
    for others in combinations(items[1:], size - 1):
        group = (items[0], *others)
        rest = tuple(item for item in items if item not in group)
        yield from ((group, *more) for more in _partitions(rest, size))
