"""The coarse bins of the histograms in metrics.jsonl: few, so that its rows stay small."""

EDGES = (-10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Between the bins of log_ratio_counts, nats; the outermost bins take the rest."""
LENGTH_BINS = 16
"""Equal bins of (0, max_new_tokens] of response_length_counts."""
