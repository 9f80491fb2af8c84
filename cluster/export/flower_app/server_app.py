"""The ServerApp: the driver of sparsyfed, whose clients are played by the nodes of Flower."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from cluster.rounds.conduct import conduct

from .rounds import Content, NodeError, NodesEngine, folder_of_the_run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment in the folder ``output``, or go on where its last checkpoint is."""
    folder = Path(str(context.run_config["output"])).expanduser().absolute()
    folder_of_the_run(folder)
    nodes = wait_for(grid, int(context.run_config["nodes"]))

    def ask(questions: Sequence[Content]) -> Sequence[Content]:
        return put(grid, nodes, questions)

    summary = conduct(
        folder, lambda _, federation: NodesEngine(federation, ask, len(nodes)), show, lambda: False
    )
    print(f"{summary['rounds']} rounds on {len(nodes)} nodes, the model is in {folder}", flush=True)


def wait_for(grid: Grid, count: int) -> list[int]:
    """The nodes, once there are so many of them."""
    while len(nodes := sorted(grid.get_node_ids())) < count:
        time.sleep(0.5)
    return nodes


def put(grid: Grid, nodes: Sequence[int], questions: Sequence[Content]) -> list[Content]:
    """Send one node each its question and wait for all answers.

    Raises:
        NodeError: A node failed, or did not answer.
    """
    asked = dict(zip(nodes, questions, strict=False))  # rounds of few clients leave nodes idle
    messages = [
        Message(RecordDict({"round": ConfigRecord(dict(question))}), dst_node_id=node, message_type="train")
        for node, question in asked.items()
    ]
    answers = {}
    for reply in grid.send_and_receive(messages):
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise NodeError(f"node {node} failed: {reply.error.reason}")
        answers[node] = dict(reply.content["round"])
    if silent := [node for node in asked if node not in answers]:
        raise NodeError(f"no answer from node {', '.join(map(str, silent))}")
    return [answers[node] for node in asked]


def show(line: dict[str, Any]) -> None:
    """A round's figures in the log."""
    figures = [
        f"{key} {value:.4g}" for key, value in line.items() if key.startswith(("test/", "val/")) and value
    ]
    print(f"round {line['round']}: {', '.join(figures)}", flush=True)
