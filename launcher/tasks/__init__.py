"""What is learned from the samples: one file for each kind of training, registered in registry.py by its name."""
