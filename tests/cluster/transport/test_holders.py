"""Who holds the current mask, against a dict that forgets nothing."""

import json

from hypothesis import given
from hypothesis import strategies as st

from cluster.transport.downlink import Holders

COHORTS = st.lists(st.tuples(st.sets(st.integers(0, 20)), st.booleans()), max_size=12)


@given(COHORTS)
def test_holders_are_those_that_got_the_last_version(rounds):
    held, holders, version = {}, Holders(), 0
    for cohort, changed in rounds:
        version += changed
        for client in range(21):
            assert holders.holds(client, version) == (held.get(client) == version)
        held |= dict.fromkeys(cohort, version)
        holders = Holders.load(json.loads(json.dumps(holders.after(cohort, version).dump())))
        current = sorted(client for client, got in held.items() if got == version)
        assert holders.clients.tolist() == current  # and none of an older version is kept
