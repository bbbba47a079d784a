"""What the tests of whole runs read from their folders."""

import json
from dataclasses import replace
from pathlib import Path


def events(config):
    return [json.loads(line) for line in (Path(config.run.output) / "events.jsonl").read_text().splitlines()]


def losses(config):
    return [event["loss"] for event in events(config) if "loss" in event]


def with_run(config, **values):
    return replace(config, run=replace(config.run, **values))
