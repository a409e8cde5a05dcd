"""A run folder on an object store: working copies, what is brought and pushed, and the lease."""
