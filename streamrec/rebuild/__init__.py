"""`streamrec rebuild`: restore Redis from the archive and the topic."""
