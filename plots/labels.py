"""Where the labels of points go: beside their point, covering nothing, as near as possible.

Every label gets a fixed set of candidate boxes on rings round its point. A candidate's own cost (distance,
direction, lines underneath, doubt about whose label it is) is known beforehand; what it costs among the
others is found by sweeping over the labels until none wants to move, from several orders of the labels.
Candidates rather than forces, because the result is then the same on every run and never settles with two
labels on top of each other while there is room elsewhere. The problem and this kind of solution:
Christensen, Marks, Shieber, "An Empirical Study of Algorithms for Point-Feature Label Placement", ACM
Transactions on Graphics 14(3), 1995, https://doi.org/10.1145/212332.212334.

Units are points of 1/72 inch, y upwards.
"""

from dataclasses import dataclass

import numpy as np

from evalq.plots.geometry import (
    Flags,
    Floats,
    box_distances,
    clipped_lengths,
    crossings,
    overlap_areas,
    point_distances,
)

PAD = 1.7  # free space round a label; a renderer at 72 dpi rounds widths by up to 1
GAP = 1.6  # between a marker and a label beside it
RINGS = (0.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 36.0, 46.0, 58.0, 72.0, 90.0, 112.0, 140.0)
N_ANGLES = 24
KEPT = 160  # cheapest candidates per label that take part in the search
LEADER_FROM = 6.5  # labels nearer than this need no leader line
MAX_ORDERS = 24
WORK = 200_000  # pairs of labels looked at in a search over all orders; bounds the time for many labels

PAIR_ROUNDS = 3
PAIR_TRIES = 15

# Costs, in points of distance that a label moves to avoid the thing.
OVERLAP = 10_000.0
LEADER_ON_LABEL = 400.0
LEADER_ON_MARKER = 120.0
LEADERS_CROSS = 150.0
LINE_UNDER = 3.0  # per point of line
LEADER_ON_LINE = 2.0
DOUBT = 7.0  # another point is as near as the label's own


@dataclass(frozen=True)
class Scene:
    """What labels must fit into.

    Args:
        anchors: the points to be labelled, [N, 2].
        sizes: width and height of their labels, [N, 2].
        marker_radius: of every point.
        bounds: the box that labels must stay in, [4].
        blocked: boxes that labels must not touch, [M, 4].
        segments: lines that labels should not cover, [K, 4].
    """

    anchors: Floats
    sizes: Floats
    marker_radius: float
    bounds: Floats
    blocked: Floats
    segments: Floats


@dataclass(frozen=True)
class Placement:
    """Where one label goes.

    Args:
        center: of its box, x and y.
        leader: line from the marker's edge to the label, [4], None when the label is near enough.
    """

    center: tuple[float, float]
    leader: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class _Candidates:
    """Candidate boxes of one label: all arrays have C rows."""

    boxes: Floats
    leaders: Floats
    has_leader: Flags
    costs: Floats


def place(scene: Scene) -> list[Placement | None]:
    """Place every label; None for one that has no place free of overlap.

    The same scene gives the same result. Nothing returned overlaps anything returned, a marker, a blocked
    box or the bounds; lines are covered only where nothing else is near.
    """
    if len(scene.anchors) == 0:
        return []
    n = len(scene.anchors)
    candidates = [_candidates(scene, i) for i in range(n)]
    found = _best(scene, candidates)
    # Those left over may go anywhere on the page; if that is not enough, all may.
    for everyone in (False, True):
        lost = [i for i in range(n) if found[i] is None]
        if not lost:
            break
        for i in range(n) if everyone else lost:
            candidates[i] = _candidates(scene, i, whole_page=True)
        found = max((found, _best(scene, candidates)), key=_n_placed)
    return found


def _n_placed(placements: list[Placement | None]) -> int:
    return sum(placement is not None for placement in placements)


def _best(scene: Scene, candidates: list[_Candidates]) -> list[Placement | None]:
    """The cheapest result over all orders."""
    orders = _orders(scene, candidates)
    sweeps = max(3, WORK // (len(orders) * len(candidates) ** 2))
    results = [_search(candidates, order, sweeps) for order in orders]
    choice = min(results, key=lambda result: result[0])[1]
    for _ in range(PAIR_ROUNDS if len(orders) > 2 else 0):
        if not _move_pairs(candidates, choice):
            break
    return _keep_free(candidates, choice)


def _candidates(scene: Scene, index: int, whole_page: bool = False) -> _Candidates:
    """The cheapest boxes for one label that touch no marker, no blocked box and no edge."""
    anchor, size = scene.anchors[index], scene.sizes[index] + 2 * PAD
    boxes, preference = _rings(anchor, size, scene.marker_radius)
    if whole_page:
        extra = _grid(size, scene.bounds)
        boxes, preference = np.concatenate([boxes, extra]), np.append(preference, np.full(len(extra), 6.0))
    radius = scene.marker_radius
    markers = np.concatenate([scene.anchors - radius, scene.anchors + radius], axis=1)
    free = (boxes[:, :2] >= scene.bounds[:2]).all(1) & (boxes[:, 2:] <= scene.bounds[2:]).all(1)
    free &= overlap_areas(boxes, markers).sum(1) + overlap_areas(boxes, scene.blocked).sum(1) == 0
    boxes, preference = boxes[free], preference[free]

    others = np.delete(scene.anchors, index, axis=0)
    nearest = np.clip(anchor, boxes[:, :2], boxes[:, 2:])
    distance = np.hypot(*(nearest - anchor).T)
    rivals = (box_distances(boxes, others) < distance[:, None] + 2.0).sum(1)
    has_leader = (distance - radius > LEADER_FROM) | ((rivals > 0) & (distance - radius > PAD + GAP))
    leaders = np.where(has_leader[:, None], _leaders(anchor, boxes, radius), np.tile(nearest, 2))

    covered = clipped_lengths(boxes, scene.segments).sum(1)
    costs = distance + preference + DOUBT * np.minimum(rivals, 3) + LINE_UNDER * covered
    apart = others[np.hypot(*(others - anchor).T) > 2 * radius]  # not those its leader must cross anyway
    near_marker = (point_distances(leaders, apart) < radius + 0.8).sum(1)
    costs += has_leader * (LEADER_ON_MARKER * near_marker + 3.0)
    costs += LEADER_ON_LINE * crossings(leaders, scene.segments).sum(1)
    kept = np.argsort(costs, kind="stable")[: len(costs) if whole_page else KEPT]
    return _Candidates(boxes[kept], leaders[kept], has_leader[kept], costs[kept])


def _rings(anchor: Floats, size: Floats, radius: float) -> tuple[Floats, Floats]:
    """Boxes round a point and what their direction costs, [C, 4] and [C]."""
    angles = np.arange(N_ANGLES) * (2 * np.pi / N_ANGLES)
    direction = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    square = direction / np.abs(direction).max(axis=1, keepdims=True)
    reach = radius + GAP + np.array(RINGS)
    centers = anchor + direction * reach[:, None, None] + square * (size / 2)
    # Curves fall to the right, so the space above and to the right of a point is the emptiest.
    preference = 2.0 * (1 - np.cos(angles - np.pi / 3))
    centers = centers.reshape(-1, 2)
    return np.concatenate([centers - size / 2, centers + size / 2], axis=1), np.tile(preference, len(RINGS))


def _leaders(anchor: Floats, boxes: Floats, radius: float) -> Floats:
    """Lines from the marker's edge towards the middle of each box, ending at its edge, [C, 4]."""
    size = boxes[:, 2:] - boxes[:, :2]
    target = np.clip(anchor, boxes[:, :2] + 0.35 * size, boxes[:, 2:] - 0.35 * size)
    rays = np.concatenate([np.broadcast_to(anchor, target.shape), target], axis=1)
    length = np.hypot(*(target - anchor).T)
    inside = np.diagonal(clipped_lengths(boxes, rays)) - PAD
    unit = (target - anchor) / length[:, None]
    start, end = anchor + unit * radius, anchor + unit * np.maximum(length - inside, radius)[:, None]
    return np.concatenate([start, end], axis=1)


def _grid(size: Floats, bounds: Floats) -> Floats:
    """Boxes in rows and columns over the whole of the bounds, [C, 4]."""
    low, high = bounds[:2], bounds[2:] - size
    if (high < low).any():
        return np.zeros((0, 4))
    columns, rows = (np.arange(low[k], high[k] + 1e-9, size[k] / 2) for k in (0, 1))
    corner = np.stack(np.meshgrid(columns, rows, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.concatenate([corner, corner + size], axis=1)


def _orders(scene: Scene, candidates: list[_Candidates]) -> list[list[int]]:
    """Orders to start from: the most crowded first, along both axes, then shuffled with a fixed seed."""
    distances = np.hypot(*np.moveaxis(scene.anchors[:, None] - scene.anchors[None], -1, 0))
    crowding = np.exp(-distances / 40.0).sum(1)
    by_x, by_y = scene.anchors[:, 0], scene.anchors[:, 1]
    orders = [np.argsort(key, kind="stable") for key in (-crowding, crowding, by_x, -by_x, by_y, -by_y)]
    # With 10 sweeps each they stay within WORK; two at least.
    wanted = min(MAX_ORDERS, max(2, WORK // (10 * len(candidates) ** 2)))
    generator = np.random.default_rng(0)
    orders += [generator.permutation(len(candidates)) for _ in range(wanted - len(orders))]
    orders = orders[:wanted]
    return [[int(i) for i in order] for order in orders]


def _search(candidates: list[_Candidates], order: list[int], sweeps: int) -> tuple[float, list[int]]:
    """Move one label after the other to its cheapest place until none moves; total cost and choices."""
    n = len(candidates)
    boxes, leaders = np.full((n, 4), np.nan), np.full((n, 4), np.nan)
    choice, costs, drawn = [-1] * n, np.zeros(n), np.zeros(n, dtype=bool)
    for _ in range(sweeps):
        moved = False
        for i in order:
            mine = candidates[i]
            if len(mine.costs) == 0:
                costs[i] = 2 * OVERLAP
                continue
            others = [j for j in order if j != i and choice[j] >= 0]
            lines = [j for j in others if drawn[j]]
            among = mine.costs + _conflicts(mine, boxes[others], leaders[lines])
            pick = int(np.argmin(among))
            costs[i] = among[pick]
            if pick != choice[i]:
                moved, choice[i] = True, pick
                boxes[i], leaders[i] = mine.boxes[pick], mine.leaders[pick]
                drawn[i] = mine.has_leader[pick]
        if not moved:
            break
    return float(costs.sum()), choice


def _move_pairs(candidates: list[_Candidates], choice: list[int]) -> bool:
    """Move two labels at once where one is in the other's way; changes `choice`, says whether it did."""
    before = list(choice)
    placed = [i for i, pick in enumerate(choice) if pick >= 0]
    for i, j in ((i, j) for i in placed for j in placed if i < j):
        one, two = candidates[i], candidates[j]
        if _against(candidates, choice, i, [j])[choice[i]] == 0:
            continue
        rest = [k for k in placed if k not in (i, j)]
        one_costs = one.costs + _against(candidates, choice, i, rest)
        two_costs = two.costs + _against(candidates, choice, j, rest)
        # The present pair first: another has to be cheaper.
        now = one_costs[choice[i]] + (two_costs + _against(candidates, choice, j, [i]))[choice[j]]
        cheapest = np.argsort(one_costs, kind="stable")
        there = overlap_areas(one.boxes[cheapest], two.boxes[choice[j] : choice[j] + 1])[:, 0] > 0
        # The cheapest places, and those the other one has to leave first.
        for a in np.concatenate([cheapest[:PAIR_TRIES], cheapest[there][:PAIR_TRIES]]):
            old, choice[i] = choice[i], int(a)
            totals = one_costs[a] + two_costs + _against(candidates, choice, j, [i])
            b = int(np.argmin(totals))
            if totals[b] < now - 1e-6:
                now, choice[j] = totals[b], b
            else:
                choice[i] = old
    return choice != before


def _against(candidates: list[_Candidates], choice: list[int], i: int, others: list[int]) -> Floats:
    """What each candidate of label i costs among the chosen places of others, [C]."""
    boxes = np.array([candidates[k].boxes[choice[k]] for k in others]).reshape(-1, 4)
    drawn = [k for k in others if candidates[k].has_leader[choice[k]]]
    leaders = np.array([candidates[k].leaders[choice[k]] for k in drawn]).reshape(-1, 4)
    return _conflicts(candidates[i], boxes, leaders)


def _conflicts(mine: _Candidates, boxes: Floats, leaders: Floats) -> Floats:
    """What each candidate of one label costs among the labels that are placed, [C]."""
    cost = OVERLAP * (overlap_areas(mine.boxes, boxes) > 0).sum(1)
    cost = cost + LEADER_ON_LABEL * (clipped_lengths(mine.boxes, leaders) > 0).sum(1)
    under = (clipped_lengths(boxes, mine.leaders) > 0).sum(0)
    cost = cost + LEADER_ON_LABEL * under
    return np.asarray(cost + LEADERS_CROSS * crossings(mine.leaders, leaders).sum(1), dtype=np.float64)


def _keep_free(candidates: list[_Candidates], choice: list[int]) -> list[Placement | None]:
    """The chosen places, without those that overlap one already kept."""
    found: list[Placement | None] = []
    kept = np.zeros((0, 4))
    for mine, pick in zip(candidates, choice, strict=True):
        if pick < 0 or (overlap_areas(mine.boxes[pick : pick + 1], kept) > 0).any():
            found.append(None)
            continue
        box = mine.boxes[pick]
        kept = np.concatenate([kept, box[None]])
        x0, y0, x1, y1 = (float(v) for v in mine.leaders[pick])
        center = (float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2)
        found.append(Placement(center, (x0, y0, x1, y1) if mine.has_leader[pick] else None))
    return found
