"""How a run runs: from a recipe's config to a finished run folder, on one machine or many."""
