"""Puts examples together into rows of nearly equal length, so that little is computed for padding."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute examples over rows of at most ``capacity`` tokens: longest first, each into the fullest row it fits.

    Returns every row's example numbers in order, rows by their first. Deterministic. Takes n·log n for the sort, and
    for each example a search in a bit set of ``capacity`` bits. Lengths have to be 1 … ``capacity``.
    """
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n: there is a row with room for exactly n tokens
    for example in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[example]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room = capacity
            row = len(rows)
            rows.append([])
        rows[row].append(example)
        left = room - length
        if left:
            rows_by_room[left].append(row)
            rooms |= 1 << left
    return sorted(sorted(row) for row in rows)
