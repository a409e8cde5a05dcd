"""Rollouts as people look at them: per step, group by group, and what they sum up to."""
