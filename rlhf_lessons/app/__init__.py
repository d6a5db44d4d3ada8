"""The command line: read what was given once, run the stages, keep a run's folder."""
