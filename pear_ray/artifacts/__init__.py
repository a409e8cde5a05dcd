"""What a run leaves on disk: run folder, manifests, tables, checkpoints."""
