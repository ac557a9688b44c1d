"""Timing the kernels against their peers, and the files that keep the results.

Everything but the timing itself works without a GPU: reading stored results, their table and plot.
The command line over it is ``hopper-attention bench``.
"""
