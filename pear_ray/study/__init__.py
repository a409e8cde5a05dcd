"""Several SFTs, one RL: which ends best, over seeds and with controls."""
