"""`streamrec retrain`: train on new clicks, compare with the champion, promote."""
