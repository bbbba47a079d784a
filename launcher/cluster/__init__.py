"""Starts and watches runs on clusters: Slurm, or hosts over ssh. Runs commands and reads run folders; no training."""
