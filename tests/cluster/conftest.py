"""The wire, recorded."""

from dataclasses import replace

import pytest

from cluster.transport import downlink as downlink_module
from cluster.transport import uplink as uplink_module
from cluster.transport import wire


class Recorded:
    """The wire as one module sees it; keeps every message and every decoded update."""

    def __init__(self):
        self.sent, self.received = [], []

    def __getattr__(self, name):
        return getattr(wire, name)

    def encode(self, *arguments, **options):
        self.sent.append(wire.encode(*arguments, **options))
        return self.sent[-1]

    def decode(self, *arguments, **options):
        message = wire.decode(*arguments, **options)
        # The host decodes the next update into the same memory.
        self.received.append(replace(message, values=message.values.copy()))
        return message


@pytest.fixture
def uplink(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(uplink_module, "wire", recorded)
    return recorded


@pytest.fixture
def downlink(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(downlink_module, "wire", recorded)
    return recorded
