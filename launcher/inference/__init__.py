"""After training: answers from a model, a talk with it, the adapter merged into its base or written as a LoRA."""
