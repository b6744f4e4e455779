"""streamrec: clicks from Kafka, one SASRec token a click, fresh top-k lists in Redis.

The path of a click is spelled out in worker.py; daemon.py puts the parts together.
"""
