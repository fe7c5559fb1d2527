"""Training: an objective says what is trained and how its loss is made; the loop, the state and the checkpoints are
common to all.
"""
