"""The click topic on disk, to train from."""
