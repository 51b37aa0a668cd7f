"""Sets of whole numbers kept as sorted, disjoint, half-open intervals."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class IntervalSet:
    """A set of integers that is cheap when its members stand in long runs.

    Starts and ends lie in two lists of equal length, so that a membership test is one binary search.
    """

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        """Take (start, end) pairs in any order; they may overlap."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in intervals:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Put every n with start <= n < end in, merging what touches."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def discard(self, start: int, end: int) -> None:
        """Take every n with start <= n < end out; what is not there is ignored."""
        if start >= end:
            return
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        kept: list[tuple[int, int]] = []
        if self._starts[first] < start:
            kept.append((self._starts[first], start))
        if self._ends[last - 1] > end:
            kept.append((end, self._ends[last - 1]))
        self._starts[first:last] = [low for low, _ in kept]
        self._ends[first:last] = [high for _, high in kept]

    def __contains__(self, number: int) -> bool:
        """Whether the number lies in one of the intervals."""
        at = bisect_right(self._starts, number) - 1
        return at >= 0 and number < self._ends[at]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The intervals from left to right."""
        return zip(self._starts, self._ends, strict=True)

    def __len__(self) -> int:
        """How many numbers are in the set, not how many intervals."""
        return sum(end - start for start, end in self)

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What is missing between start and end."""
        at = start
        for low, high in self:
            if high <= at:
                continue
            if low >= end:
                break
            if low > at:
                yield at, low
            at = high
        if at < end:
            yield at, end

    def __repr__(self) -> str:
        """As it could be typed."""
        return f"IntervalSet({list(self)})"
