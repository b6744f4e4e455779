"""`streamrec retrain`: train on new clicks, judge, promote."""
