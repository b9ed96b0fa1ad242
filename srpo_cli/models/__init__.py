"""Model families: prompts, velocities, images and each family's own clock; one file per family."""
