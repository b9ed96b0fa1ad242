"""What a training step costs, counted and timed against a loop written by hand; not part of the installed package."""
