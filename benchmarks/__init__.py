"""Measurements of duet_kernels. Imports duet_kernels, never duet."""
