"""`loldu sweep`: train a recipe with every combination of some options, and compare the runs."""
