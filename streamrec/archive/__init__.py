"""The click topic as Parquet files, for training and for restoring Redis."""
