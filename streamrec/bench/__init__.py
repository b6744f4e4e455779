"""`streamrec bench`: what a click costs on this machine."""
