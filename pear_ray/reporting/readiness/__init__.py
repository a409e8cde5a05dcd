"""The readiness report: what RL would make of the SFT checkpoint, before it is started."""
