"""The only place that imports vLLM: the in-process engine, and weight sync into it."""
