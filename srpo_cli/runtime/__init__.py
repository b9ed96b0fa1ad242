"""What every run needs whatever it trains: its folder, checkpoints, signals, pictures, prompts and counts."""
