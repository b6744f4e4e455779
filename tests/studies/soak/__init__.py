"""A soak: hours of SIGKILLs on Apache Kafka, Redis with a replica, daemons and retraining; `make soak` runs it.

state      what has happened; a file in the soak's folder, from which it continues
plant      the processes: broker, both Redis servers, daemons, worker of retraining
feed       clicks and bad records, each numbered and derived from the seed
chaos      SIGKILLs, rebalances and model swaps
verdict    topic, Redis, dead letters and archive against the oracle, in the end
picture    what happened when, and how soon all worked again
"""
