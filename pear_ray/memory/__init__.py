"""How much memory each phase of a run will take, worked out before anything starts."""
