"""A curve of bounded length: the longer it gets, the coarser it is."""

from __future__ import annotations

import math

from msgspec import Struct

MAX_POINTS = 480


class Point(Struct, array_like=True):
    """The mean of ``count`` values in one interval, whose last was at ``at`` (seconds since 1970)."""

    at: float
    value: float
    count: int


class Series(Struct):
    """Points in intervals of ``width_s``, at most 480: when there are more, the intervals become twice as wide."""

    width_s: float = 1.0
    points: list[Point] = []

    def add(self, at: float, value: float) -> None:
        """Times that go back are taken for the last one's; what is not finite is left out."""
        if not math.isfinite(value):
            return
        if self.points:
            at = max(at, self.points[-1].at)
        self._put(Point(at, value, 1))
        while len(self.points) > MAX_POINTS:
            self._coarsen()

    def _put(self, point: Point) -> None:
        last = self.points[-1] if self.points else None
        if last is None or math.floor(last.at / self.width_s) != math.floor(point.at / self.width_s):
            self.points.append(point)
            return
        count = last.count + point.count
        last.value += (point.value - last.value) * point.count / count
        last.at, last.count = point.at, count

    def _coarsen(self) -> None:
        self.width_s *= 2
        points, self.points = self.points, []
        for point in points:
            self._put(point)
