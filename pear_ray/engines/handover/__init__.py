"""An exported checkpoint on its way to the next stage: what it must still be, and whether it is."""
