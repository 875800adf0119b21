"""What a training leaves in its folder: whole checkpoints, the record of the run, and the model card."""
