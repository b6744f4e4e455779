"""Errors whose message is one clear line for the operator.

StreamrecError
├── SettingsError      a setting is wrong, or two settings conflict
├── KafkaUnavailable   Kafka is unreachable or refuses the connection
│   └── KafkaRefused   Kafka refuses the login or the connection; only an operator can fix this
├── KafkaForbidden     Kafka refuses a right or a setting; only an operator can fix this
├── TopicChanged       the topic is not the one that was read before
├── RedisUnavailable   Redis is unreachable or refuses a command
│   ├── RedisRefused   Redis refuses the login, the connection or a right; only an operator can fix this
│   └── RedisTakesNoWrites   Redis answers, but is full, read-only or without its replicas
├── RedisRejected      Redis refuses a command because of the data in it or in a key; waiting would not help
├── StoreUnavailable   a folder or object store of models or clicks cannot be read or written
│   └── StoreUnreachable   the object store does not answer
├── NoChampion         the registry has no champion yet
├── Stopped            a signal came while the process waited
├── DaemonEnded        the daemon of a demo or a measurement has ended
├── EmbeddedError      an embedded server cannot be started
├── ArchiveError       the event archive is damaged
│   └── ArchiveTaken   another process writes to the archive
├── RegistryError      a model version is missing or damaged, or cannot be published or promoted
│   └── Overtaken      the champion is no longer the one that a round was judged against, or is on hold
├── RetrainError       training failed, or there are too few clicks to train or to compare models on
├── RetrainStopped     a round of retraining was stopped before it had a model
├── Unexplained        the daemon cannot explain now why an item is in a list
├── BadRecord          a record is not a click event and becomes a dead letter
└── BatchAbandoned     the group rebalances, so the current batch may belong to another member
"""

RIGHTS_ARE_LISTED = "the rights that streamrec needs are listed in deploy/SECURITY.md"


class StreamrecError(Exception):
    """The root of the tree: every error below it has a message for the operator."""


def reason(error: BaseException) -> str:
    """Return an error for a log line: our own have a message for the operator, of others the type says more."""
    return str(error) if isinstance(error, StreamrecError) else f"{type(error).__name__}: {error}"


class SettingsError(StreamrecError):
    """A setting is wrong; the message gives its name and allowed values."""


class KafkaUnavailable(StreamrecError):
    """Kafka is unreachable or refuses the connection; waiting may help."""


class KafkaRefused(KafkaUnavailable):
    """Kafka refuses the login or the connection: an error at start; a running daemon waits for an operator."""


class KafkaForbidden(StreamrecError):
    """Kafka refuses a right or a setting for good; the message names it. The program ends."""


class TopicChanged(StreamrecError):
    """The topic was deleted and created again, or cut back; the message names the remedy. The program ends."""


class RedisUnavailable(StreamrecError):
    """Redis is unreachable or refuses a command; waiting may help."""


class RedisRefused(RedisUnavailable):
    """Redis refuses the login, the connection or a right: an error at start; a running daemon waits for an operator."""


class RedisTakesNoWrites(RedisUnavailable):
    """Redis answers, but takes no writes now: it is full, read-only, loads its data, or lacks its replicas."""


class RedisRejected(StreamrecError):
    """Redis refuses a command because of the data in it or in a key; waiting would not help."""


class NoChampion(StreamrecError):
    """The registry has no champion yet; the message says how to make one."""


class Stopped(StreamrecError):
    """A signal came while the process waited for what it needs to start."""


class SchemaMissing(StreamrecError):
    """The schema registry does not answer, or does not have a schema; waiting may help."""


class StoreUnavailable(StreamrecError):
    """A folder or object store cannot be read or written: it is unreachable, refuses access, or is full."""


class StoreUnreachable(StoreUnavailable):
    """An object store does not answer; waiting may help."""


class DaemonEnded(StreamrecError):
    """A daemon that this process has started has ended; its log says why."""


class EmbeddedError(StreamrecError):
    """An embedded server is not installed or cannot be started."""


class ArchiveError(StreamrecError):
    """The event archive cannot be used; the message names the file and the remedy."""


class ArchiveTaken(ArchiveError):
    """Another process writes to the event archive; only an operator can fix this."""


class RegistryError(StreamrecError):
    """The registry or one of its versions cannot be used; the message names it and the remedy."""


class Overtaken(RegistryError):
    """A round may not promote: the champion was changed or is on hold, or another worker began a round meanwhile."""


class RetrainError(StreamrecError):
    """A round of retraining failed; the message gives the reason and what would help."""


class RetrainStopped(StreamrecError):
    """A round of retraining was stopped; nothing was published."""


class Unexplained(StreamrecError):
    """The daemon cannot explain why an item is in a list; the message is shown on the page."""


class BadRecord(StreamrecError):
    """A record is not a click event and never will be; the message is the reason in the dead letter."""


class BatchAbandoned(StreamrecError):
    """A rebalance ended the current batch; its events are redelivered."""
