"""The base model: its files, its skeleton, filled and quantised weights, answers."""
