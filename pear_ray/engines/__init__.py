"""One adapter per heavy library; no Ray."""
