"""pear_ray: from an offline corpus to an RL-tuned model on one Ray cluster."""

__version__ = "0.1.0"
