"""Where a run is started: Slurm, hosts over ssh. Starts commands and reads a run folder's files; no training here."""
