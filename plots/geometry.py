"""Plane geometry on arrays, for label placement.

Boxes are rows [x0, y0, x1, y1] with x0 <= x1 and y0 <= y1; segments are rows [x0, y0, x1, y1] from end to
end. In shapes: C and M count the rows of the first and the second argument.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def overlap_areas(boxes: Floats, others: Floats) -> Floats:
    """Area that each box shares with each other box, [C, M]."""
    width = np.minimum(boxes[:, None, 2], others[None, :, 2]) - np.maximum(
        boxes[:, None, 0], others[None, :, 0]
    )
    height = np.minimum(boxes[:, None, 3], others[None, :, 3]) - np.maximum(
        boxes[:, None, 1], others[None, :, 1]
    )
    return np.asarray(np.clip(width, 0, None) * np.clip(height, 0, None))


def clipped_lengths(boxes: Floats, segments: Floats) -> Floats:
    """Length of each segment inside each box, [C, M] (Liang and Barsky's clipping)."""
    start, delta = segments[:, :2], segments[:, 2:] - segments[:, :2]
    enter = np.zeros((len(boxes), len(segments)))
    leave = np.ones((len(boxes), len(segments)))
    for axis in (0, 1):
        step = np.where(np.abs(delta[:, axis]) < 1e-9, 1e-9, delta[:, axis])
        near = (boxes[:, None, axis] - start[None, :, axis]) / step
        far = (boxes[:, None, axis + 2] - start[None, :, axis]) / step
        enter = np.maximum(enter, np.minimum(near, far))
        leave = np.minimum(leave, np.maximum(near, far))
    return np.asarray(np.clip(leave - enter, 0, None) * np.hypot(delta[:, 0], delta[:, 1]))


def crossings(segments: Floats, others: Floats) -> Flags:
    """Whether each segment properly crosses each other segment, [C, M]."""
    mine, theirs = segments[:, None, :], others[None, :, :]
    around = _side(mine, theirs[..., 0], theirs[..., 1]) * _side(mine, theirs[..., 2], theirs[..., 3]) < 0
    across = _side(theirs, mine[..., 0], mine[..., 1]) * _side(theirs, mine[..., 2], mine[..., 3]) < 0
    return np.asarray(around & across)


def point_distances(segments: Floats, points: Floats) -> Floats:
    """Distance of each point from each segment, [C, M]; segments of length 0 are points."""
    start, delta = segments[:, None, :2], (segments[:, 2:] - segments[:, :2])[:, None, :]
    squared = np.maximum((delta**2).sum(-1), 1e-12)
    along = np.clip(((points[None] - start) * delta).sum(-1) / squared, 0, 1)
    nearest = start + along[..., None] * delta
    return np.asarray(np.hypot(*np.moveaxis(points[None] - nearest, -1, 0)))


def box_distances(boxes: Floats, points: Floats) -> Floats:
    """Distance of each point from each box, 0 inside, [C, M]."""
    nearest = np.clip(points[None], boxes[:, None, :2], boxes[:, None, 2:])
    return np.asarray(np.hypot(*np.moveaxis(points[None] - nearest, -1, 0)))


def _side(segment: Floats, x: Floats, y: Floats) -> Floats:
    """Above 0 where a point is to the left of a segment, below 0 to the right."""
    x0, y0, x1, y1 = (segment[..., k] for k in range(4))
    return np.asarray((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0))
