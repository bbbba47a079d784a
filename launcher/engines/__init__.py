"""How a model lies over processes: one file for each engine."""
