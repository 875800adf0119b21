"""Attacks on forgetting (`duet attack`).

attacks        ATTACKS: every attack, a function and a line each
rows, target   what must not come back; the model that is asked
weights        rounding, fine-tuning and adapters, undone afterwards
distribution   membership inference and ranks
runner         runs them, resumable; the worst comes first
"""

from ..._moved import names_of

__getattr__ = names_of(__name__)
