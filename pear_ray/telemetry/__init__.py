"""Numbers and progress: metrics.jsonl, trackers, the live view."""
