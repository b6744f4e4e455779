"""`streamrec bench`: the cost of a click on this machine."""
