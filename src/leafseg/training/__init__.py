"""One training loop, the tasks it runs, and the checkpoints it writes."""
