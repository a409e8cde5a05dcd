"""A run's models behind an OpenAI-compatible address, on Ray Serve."""
