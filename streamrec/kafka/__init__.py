"""The Kafka side: only this package imports aiokafka."""
