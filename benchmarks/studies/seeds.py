"""What seeds say together."""

from collections.abc import Sequence

import numpy as np

from duet.evaluation.intervals import Interval, mean_interval


def over_seeds(shares: Sequence[float]) -> Interval:
    """Mean of a seed's shares with Student's interval, cut at 0 and 1; also where all are 0 or 1, for each is of many questions."""
    mean, *ends = mean_interval(shares, shares=False)
    low, high = np.clip(ends, 0.0, 1.0).tolist()
    return Interval(mean, low, high)
