"""After training: generate, chat, merge an adapter into its base, or convert it to LoRA."""
