"""The commands without a room of their own: sample.py and train.py, bdm-sample and bdm-train where installed."""
