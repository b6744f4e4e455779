"""streamrec turns clicks from Kafka into fresh top-k lists in Redis, one SASRec token per click.

serving/worker.py spells out the path of a click; daemon.py puts the parts together.
"""
