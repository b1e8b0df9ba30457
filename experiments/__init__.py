"""One runnable module per study: its docstring has the command and the expected numbers."""
