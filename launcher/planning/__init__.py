"""`loldu plan`: what a run will take, from shapes alone."""
