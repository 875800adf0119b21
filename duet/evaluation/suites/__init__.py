"""Suites of questions (`duet eval`): a YAML file -> rows -> what the model says -> means and intervals.

suite          the YAML file, checked; the files beside this one are the suites that are shipped
asking         a row -> token ids
runner         asks, row by row, resumable
row_metrics    the metrics of a row; summary: of all rows
"""

from ..._moved import names_of

__getattr__ = names_of(__name__)
