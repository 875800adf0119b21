"""Means over the seeds of a study, with intervals."""

from collections.abc import Sequence

import numpy as np

from duet.evaluation.intervals import Interval, mean_interval


def over_seeds(shares: Sequence[float]) -> Interval:
    """The mean of one share for each seed, with Student's interval, cut at 0 and 1. Also where all are 0 or 1: each is a share of many
    questions, not one question, so that Wilson's would be wrong."""
    mean, *ends = mean_interval(shares, shares=False)
    low, high = np.clip(ends, 0.0, 1.0).tolist()
    return Interval(mean, low, high)
