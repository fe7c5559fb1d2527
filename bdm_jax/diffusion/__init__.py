"""Noise schedules, samplers, guidance and losses. Knows no network: it is given predictions."""
