"""The run folder: log, events, samples, checkpoints, export."""
