"""`streamrec demo`: train, serve and replay real clicks on one machine."""
