"""Errors that end in one clear line for the person who runs the daemon.

StreamrecError
├── SettingsError      a setting is wrong, or two do not fit together
├── KafkaUnavailable   Kafka cannot be reached, or refuses us
├── RedisUnavailable   Redis cannot be reached, or refuses a command
│   └── RedisRefused   it refuses our password, or has no right for us: nothing mends itself
├── EmbeddedError      an embedded server cannot be started
├── ArchiveError       the event archive cannot be read or written
├── RegistryError      a model version is missing, damaged, or cannot be published or promoted
├── RetrainError       there is too little to train or to judge on, or training failed
├── RetrainStopped     a round was told to stop before it had a model
├── Unexplained        why an item is in a list cannot be told now
├── BadRecord          a record is no click event: dead letter
└── BatchAbandoned     the partitions of the batch in hand were given to somebody else
"""

RIGHTS_ARE_LISTED = "the rights that streamrec needs are listed in deploy/SECURITY.md"


class StreamrecError(Exception):
    """The root: whoever catches it has a message fit for a person."""


class SettingsError(StreamrecError):
    """A setting is wrong; the message names it and what would be right."""


class KafkaUnavailable(StreamrecError):
    """Kafka cannot be reached or refuses us; waiting may help, except at start."""


class RedisUnavailable(StreamrecError):
    """Redis cannot be reached or refuses a command; waiting may help, except at start."""


class RedisRefused(RedisUnavailable):
    """Redis refuses who we are or what we do; only a person can help, and then waiting goes on."""


class EmbeddedError(StreamrecError):
    """An embedded server cannot be found or started."""


class ArchiveError(StreamrecError):
    """The event archive cannot be used; the message names the file and what to do."""


class RegistryError(StreamrecError):
    """The registry or a version in it cannot be used; the message says which and what to do."""


class RetrainError(StreamrecError):
    """A round of retraining cannot be done; the message says why and what would help."""


class RetrainStopped(StreamrecError):
    """A round of retraining was told to stop; nothing was published."""


class Unexplained(StreamrecError):
    """Why an item is in a list cannot be told; the message is for who asked."""


class BadRecord(StreamrecError):
    """A record that is no click event, now or ever; the message is the dead letter's reason."""


class BatchAbandoned(StreamrecError):
    """A rebalance took the batch in hand away; its events will be delivered again."""
