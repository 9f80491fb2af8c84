"""A finished run to export."""

import pytest

import cluster
from cluster.export.finished import Finished
from cluster.records import outputs
from tests.tiny_experiment import tiny_federation


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """Top-K on digits, evaluated on held-out rows too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("picture", "curves", "population"):
            patch.setattr(outputs, name, lambda *_, **__: None)
        data, local = {"name": "digits", "validation": 0.2}, {"batch_size": 64}
        config = tiny_federation(cache, algorithm={"name": "topk", "sparsity": 0.8}, data=data, local=local)
        run = cluster.run(config, tmp_path_factory.mktemp("finished") / "run")
    return Finished.open(run.folder)
