"""Write the settings and metrics references in deploy/ from the code: `make reference`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from streamrec.metrics import Metrics, RetrainMetrics
from streamrec.settings import Setting, all_settings, groups

DEPLOY = Path(__file__).parents[2] / "deploy"
GENERATED = "Generated from the code by `make reference`; do not edit.\n"
LIBRARY_GROUPS = {
    "model": "The model directory to serve, and the shape of the models that retraining makes.",
    "train": "How retraining trains.",
}


def settings_page() -> str:
    """Return the settings reference."""
    parts = [
        "# Settings\n",
        GENERATED,
        "Flags win over environment variables, these over the TOML file of `--config`, and that over the defaults. A "
        "setting is `--kafka-topic` on the command line (`streamrec COMMAND --help` lists the flags of a command), "
        "`STREAMREC_KAFKA_TOPIC` in the environment, and in the file `topic` in table `[kafka]`. A secret may also be "
        "in a file: `STREAMREC_REDIS_PASSWORD_FILE=/run/secrets/redis`. `streamrec check --show` prints the settings "
        "in force.\n",
        "**Bold** settings are those that most deployments set or check; the others are advanced: their defaults fit "
        "almost everyone.\n",
    ]
    for group, settings in groupby(all_settings().values(), key=lambda setting: setting.group):
        parts.append(f"## [{group}]\n")
        parts.append(f"{LIBRARY_GROUPS.get(group) or (groups()[group].__doc__ or '').splitlines()[0]}\n")
        parts.append("| variable | default | meaning |\n|---|---|---|")
        parts += [_row(setting) for setting in settings]
        parts.append("")
    return "\n".join(parts)


def metrics_page() -> str:
    """Return the metrics reference."""
    parts = [
        "# Metrics\n",
        GENERATED,
        "Prometheus metrics at `/metrics`. Times are in seconds. A counter's name ends in `_total`; a histogram has "
        "`_bucket`, `_sum` and `_count`.\n",
    ]
    pages = (
        ("streamrec serve", Metrics().registry, "http_port"),
        ("streamrec retrain", RetrainMetrics().registry, "retrain_http_port"),
    )
    for process, registry, port in pages:
        parts.append(f"## {process}\n")
        parts.append(f"Port: `{all_settings()[port].variable}` [{all_settings()[port].default}].\n")
        parts.append("| metric | type | labels | meaning |\n|---|---|---|---|")
        parts += _metric_rows(registry)
        parts.append("")
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    name = setting.variable if setting.advanced else f"**{setting.variable}**"
    allowed = f" ({', '.join(setting.choices)})" if setting.choices else ""
    return f"| {name} | {_default(setting)} | {setting.help}{allowed} |".replace("TOPIC|", "TOPIC\\|")


def _default(setting: Setting) -> str:
    value = setting.default.get_secret_value() if isinstance(setting.default, SecretStr) else setting.default
    if value in (None, "", (), {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _metric_rows(registry: CollectorRegistry) -> Iterator[str]:
    for metric in sorted(registry.collect(), key=lambda metric: metric.name):
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        labels = ", ".join(f"`{label}`" for label in _labels(registry, metric.name))
        yield f"| `{name}` | {metric.type} | {labels} | {metric.documentation} |"


def _labels(registry: CollectorRegistry, name: str) -> tuple[str, ...]:
    return next(c._labelnames for c, names in registry._collector_to_names.items() if name in names)  # type: ignore[attr-defined]


PAGES = {"SETTINGS.md": settings_page, "METRICS.md": metrics_page}


def main() -> int:
    """Write the pages."""
    for name, page in PAGES.items():
        (DEPLOY / name).write_text(page(), "utf-8")
        print(f"wrote {DEPLOY / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
