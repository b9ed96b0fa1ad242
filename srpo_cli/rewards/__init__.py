"""Reward models: images and texts in, one differentiable number per image out; one file per reward."""
