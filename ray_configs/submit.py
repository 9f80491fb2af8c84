"""Run a sparsyfed command on the head of a cluster: the one file that ``ray submit`` copies there.

    ray submit ray_configs/cluster-aws-gpu.yaml ray_configs/submit.py -- run quickstart rounds=50

``ray submit`` joins the words with spaces and has a shell read them again. Values that were split inside
their brackets are put together here. What else a shell would change (quotes, ``*``, ``$`` ...) is made safe
first:

    ray submit CLUSTER.yaml ray_configs/submit.py -- \
        $(python ray_configs/submit.py --quote run 'algorithm.plain_layers=["*shortcut*"]')

The package itself comes from the cluster file's ``setup_commands``.
"""

import os
import sys
from urllib.parse import quote, unquote

#: Commands that compute, here on the cluster that this node is the head of.
COMPUTING = ("run", "resume", "tune")


def restored(words: list[str]) -> list[str]:
    """The words as they were typed: decoded, or those split inside brackets joined again."""
    if words[:1] == ["--quoted"]:
        return [unquote(word) for word in words[1:]]
    whole: list[str] = []
    depth = 0
    for word in words:
        if depth > 0:
            whole[-1] += f" {word}"
        else:
            whole.append(word)
        depth += sum(word.count(bracket) for bracket in "[{") - sum(word.count(bracket) for bracket in "]}")
    if depth:
        raise SystemExit(f"brackets do not close in: {' '.join(words)}; see --quote in {__file__}")
    return whole


def main(words: list[str]) -> int:
    """Run the command, on this cluster unless it names another."""
    if words[:1] == ["--quote"]:
        print("--quoted", *(quote(word, safe="/=,") for word in words[1:]))
        return 0
    words = restored(words) or ["run"]
    if words[0] in COMPUTING and not any(word.startswith("address=") for word in words):
        words.append("address=auto")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from cluster.cli import main as sparsyfed

    return sparsyfed(words)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
