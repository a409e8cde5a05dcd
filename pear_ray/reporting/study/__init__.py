"""A study's report: which SFT ends best after RL, and how sure that is."""
