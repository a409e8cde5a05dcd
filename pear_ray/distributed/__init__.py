"""The Ray layer: the only place that starts actors."""
