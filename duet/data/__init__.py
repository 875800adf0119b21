"""Rows and prompts: a file -> rows -> queries -> token batches in which student and teacher are aligned.

sources     a file, or a dataset on the Hub -> rows
importers   files of other benchmarks -> rows that are evaluated
rows        rows -> queries (a conversation, its answer, its subject)
prompts     a conversation -> token ids: chat templates, where a steering prefix goes, how an answer is appended
dataset     queries -> items, batches and the order in which they are drawn
"""

from .._moved import names_of

__getattr__ = names_of(__name__)
