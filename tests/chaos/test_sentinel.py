"""The group of Sentinels does what its scenario needs: another master, with what was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.chaos.processes import until
from tests.chaos.sentinel import SentinelStore


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")
@pytest.mark.timeout(180)
def test_a_failover_makes_the_replica_master(tmp_path: Path) -> None:
    store = SentinelStore(tmp_path)
    try:
        store.start()
        first = store.master
        with first.client() as client:
            client.xadd("millrace:journal:resp_1", {"d": '{"sequence_number":0}'}, id="1-0")
            # Both have it.
            until(lambda: client.wait(1, 1000) == 1, 10, "the replica has the write")
        store.fail_over()
        assert store.master is not first
        assert store.journal("resp_1") == [{"sequence_number": 0}]
    finally:
        store.stop()
