"""An override with an old signature is one clear line before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from algorithms import Algorithm, Client, registry
from algorithms.core.hooks import mistaken_hooks
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from tests.example_method import RandomK


class _OldClient(Client):
    def gradient(self):
        return None


@dataclass(frozen=True, kw_only=True)
class Old(Algorithm):
    """Written for a contract whose aggregate had no layout."""

    client = _OldClient

    def aggregate(self, state, total):
        return super().aggregate(state, total, None)


@dataclass(frozen=True, kw_only=True)
class Lenient(Algorithm):
    def aggregate(self, *arguments):
        return super().aggregate(*arguments)

    def advance(self, state, total, server, layout, share=1.0, more=None):
        return super().advance(state, total, server, layout, share)


@pytest.mark.parametrize("method", [*registry().values(), RandomK, Lenient], ids=lambda m: m.__name__)
def test_methods_override_hooks_as_they_are_called(method):
    assert list(mistaken_hooks(method)) == []


def test_an_old_signature_is_named_with_the_new_one():
    with pytest.raises(ConfigError) as raised:
        resolve("quickstart", [f"algorithm.name={__name__}:Old", "algorithm.sparsity=null"])
    assert str(raised.value).startswith(
        f"algorithm.name = '{__name__}:Old': Old.aggregate(self, state, total) is called as "
        "aggregate(self, state, total, layout); "
        "_OldClient.gradient(self) is called as gradient(self, compute)"
    )
