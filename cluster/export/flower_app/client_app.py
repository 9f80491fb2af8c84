"""The ClientApp: plays the clients that the server asks this node for."""

from __future__ import annotations

import functools

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from .rounds import Node, experiment

app = ClientApp()


@functools.cache
def node() -> Node:
    """This process's data and model, made once."""
    return Node(experiment())


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a round's question."""
    answer = node().play(dict(message.content["round"]))
    return Message(RecordDict({"round": ConfigRecord(answer)}), reply_to=message)
