"""Where batches are run, one file an engine."""
