"""Row transforms: they keep the task axis and come before an aggregator in a chain."""
