"""The exact versions of uv.lock as constraints for pip: ``python .ci/constraints.py > constraints.txt``."""

import tomllib
from pathlib import Path

LOCK = Path(__file__).parents[1] / "uv.lock"


def lines() -> list[str]:
    """A line for each package of a registry; of several versions each says where it holds."""
    return [
        f"{package['name']}=={package['version']}"
        + ("; " + " or ".join(f"({each})" for each in markers) if markers else "")
        for package in tomllib.loads(LOCK.read_text(encoding="utf-8"))["package"]
        if "registry" in package["source"]
        for markers in [package.get("resolution-markers", [])]
    ]


if __name__ == "__main__":
    print("\n".join(lines()))
