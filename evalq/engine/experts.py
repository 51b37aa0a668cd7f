"""Which experts of a mixture an engine's routers sent tokens to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ExpertTokens:
    """What went through the experts of one layer.

    Args:
        tokens: that passed its router; one that is in several windows counts in each.
        counts: of these, how many each expert was given, int64 [E]; with k experts a token they sum to k
            times `tokens`.
    """

    tokens: int
    counts: NDArray[np.int64]


# Module of the experts -> what went through them since the last call, which starts the count anew.
TakeExpertTokens = Callable[[], Mapping[str, ExpertTokens]]
