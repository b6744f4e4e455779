"""The click topic on disk, for training and for restoring Redis."""
