"""The stories: each recipe wires parts together, owns its loop and reads from top to bottom."""
