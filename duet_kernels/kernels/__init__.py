"""The Triton kernels: one file an op, each a formula, its kernels and their launchers.

Nothing is imported here, so that `duet_kernels` imports where Triton is not installed. A launcher takes flattened
tensors that `functional` has checked, and must not know about autograd, masks or reductions.
"""
