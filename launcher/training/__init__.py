"""One run: its data, its model, its steps and its checkpoints. Knows signals and an environment, no cluster."""
