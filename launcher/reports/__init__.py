"""What a run folder shows: one HTML file with its curves, its trained numbers and its answers."""
