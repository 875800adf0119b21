"""What a training leaves in its folder.

checkpoints   whole ones, and which of them is resumed
adapters      a new adapter on a model that may have had one, and how both are saved
record        what determines a run, compared when it is resumed
card          the model card
parts         parts of the loss, as they are logged
"""
