"""Prompts with verifiable answers, and the killable pool that verifies them."""
