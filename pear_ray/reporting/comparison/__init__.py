"""Several runs on one page: what differs in their settings, how they end, their curves."""
