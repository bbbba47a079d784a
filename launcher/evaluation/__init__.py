"""`loldu eval`: held-out loss, exact match, multiple choice, and tasks of lm-evaluation-harness."""
