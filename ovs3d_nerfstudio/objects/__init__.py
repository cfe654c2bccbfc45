OBJECT_GAP = 0.01
"""Points farther apart than this belong to different objects; a share of the diagonal of the box around the cameras."""
SMALLEST_OBJECT = 0.05
"""Least share of a class's points that counts as an object."""
