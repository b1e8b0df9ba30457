"""Data sets of the experiments, as arrays in memory."""
