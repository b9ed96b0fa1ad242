"""Training algorithms: rollouts and rewards in, gradients and metrics out."""
