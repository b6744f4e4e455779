"""Set up TLS to Kafka, its token endpoint and Redis, and explain TLS errors to the operator."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Literal

from streamrec.errors import SettingsError
from streamrec.setting_groups import TlsSettings

Server = Literal["kafka", "kafka_oauth", "redis", "events_schema_registry"]
KAFKA: Server = "kafka"
TOKEN_ENDPOINT: Server = "kafka_oauth"
REDIS: Server = "redis"
SCHEMA_REGISTRY: Server = "events_schema_registry"
# OpenSSL's names of errors, grouped by cause
SPEAKS_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}
REQUIRES_CERTIFICATE = {"TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_HANDSHAKE_FAILURE"}
REFUSES_CERTIFICATE = {
    "TLSV1_ALERT_UNKNOWN_CA",
    "SSLV3_ALERT_BAD_CERTIFICATE",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
    "TLSV1_ALERT_DECRYPT_ERROR",
}


def tls_context(files: TlsSettings, server: Server) -> ssl.SSLContext:
    """Return the TLS context of a connection; it verifies names and signatures.

    Raises:
        SettingsError: a file cannot be read, or certificate and key do not belong together.
    """
    ca, cert, key = files.ca_file, files.cert_file, files.key_file
    for part, path in (("ca", ca), ("cert", cert), ("key", key)):
        if path is not None:
            _check_readable(f"{server}_tls_{part}_file", path)
    context = ssl.create_default_context()
    try:
        if ca is not None:
            context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise SettingsError(f"{server}_tls_ca_file: {ca} contains no certificate in PEM format") from None
    try:
        if cert is not None:
            # without a password function, OpenSSL asks for one on the terminal
            context.load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        raise SettingsError(
            f"{server}_tls_cert_file and {server}_tls_key_file: {cert} and {key} are no certificate and its key in PEM "
            f"format, the key unencrypted ({error.reason or 'unreadable'})"
        ) from None
    return context


def _check_readable(name: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise SettingsError(f"{name}: cannot read {path}: {error.strerror}") from None


def tls_problem(error: BaseException, server: Server, files: TlsSettings) -> str | None:
    """Return the TLS problem behind an error, and what to do; None if the cause is another."""
    variable = f"STREAMREC_{server.upper()}_TLS"
    found = _ssl_error(error)
    if isinstance(found, ssl.SSLCertVerificationError):
        why = found.verify_message.rstrip(".")
        if "expired" in why or "not yet valid" in why:
            return f"its certificate is out of date ({why}): renew it, or set this machine's clock"
        if "mismatch" in why:
            return f"its certificate is for another name ({why}): use a name that the certificate contains"
        return f"its certificate is signed by an unknown CA ({why}): set {variable}_CA_FILE to its CA's certificate"
    reason = (found.reason or "") if found else ""
    if reason in SPEAKS_NO_TLS:
        return "it speaks no TLS on this port"
    if reason in REQUIRES_CERTIFICATE or (reason in REFUSES_CERTIFICATE and not files.cert_file):
        return f"it requires a client certificate: set {variable}_CERT_FILE and {variable}_KEY_FILE"
    if reason in REFUSES_CERTIFICATE:
        return f"it does not accept our client certificate ({reason}): see {variable}_CERT_FILE"
    return None


def closed_connection_hint(error: BaseException, server: Server, uses_tls: bool, files: TlsSettings) -> str:
    """Return the likely cause if a server closed a connection or did not answer; else an empty text."""
    text = f"{error} {error!r}".lower()
    closed = any(word in text for word in ("closed", "reset", "connection lost", "broken pipe"))
    if not uses_tls and closed:
        return "; does it require TLS on this port?"
    if uses_tls and (closed or "timeout connecting" in text):
        required = f"a client certificate ({server}_tls_cert_file)"
        if files.cert_file:
            required = "another client certificate"
        return f"; does it speak TLS on this port, and does it require {required}?"
    return ""


def _ssl_error(error: BaseException | None) -> ssl.SSLError | None:
    """Return the TLS error that caused an error."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error
