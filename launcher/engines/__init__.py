"""How a model is distributed over processes: one file for each engine."""
