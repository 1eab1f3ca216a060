"""A real ``millrace serve`` in a process of its own, started the way a person starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["MILLRACE", "LiveServer", "run_millrace"]

MILLRACE = Path(sys.executable).parent / "millrace"
"""Lies beside this interpreter once the project is installed."""
START_S = 180.0
IDLE_S = 60.0

_ADDRESS = re.compile(r"(http://[^\s/]+)/v1")


def _command(arguments: Sequence[str]) -> list[str]:
    return [str(MILLRACE), "serve", *arguments]


def _environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    return {**clean, "COLUMNS": "200", **(extra or {})}


class LiveServer:
    """A running server: ``url`` without a path, ``log`` what it printed so far."""

    def __init__(
        self, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self._lines: list[str] = []
        self._process = subprocess.Popen(
            _command(["--port", "0", *arguments]),
            env=_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._printed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        try:
            self.url = self._address()
        except BaseException:
            self.stop()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if _ADDRESS.search(line):
                self._printed.set()
        self._printed.set()

    def _address(self) -> str:
        assert self._printed.wait(START_S), f"no address after {START_S} s:\n{self.log}"
        found = _ADDRESS.search(self.log)
        assert found is not None, f"the server did not start:\n{self.log}"
        return found[1]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return "".join(self._lines)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int:
        """End it as an operator does, and return its exit status."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """All samples, named as in PromQL, labels in order of their names."""
        samples: dict[str, float] = {}
        _, text = self.get("/metrics")
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples

    def idle_metrics(self) -> dict[str, float]:
        """Wait until nothing runs, and return the metrics then.

        The wait is for the engine's own report of being idle; the limit only ends a failing test.
        """
        give_up_s = time.monotonic() + IDLE_S
        while True:
            samples = self.metrics()
            busy = {name: samples[name] for name in _ZERO_WHEN_IDLE if samples[name]}
            held = samples["millrace_kv_blocks"] - samples["millrace_kv_blocks_free"]
            if not busy and not held:
                return samples
            assert time.monotonic() < give_up_s, f"left behind: {busy}, {held} blocks held"

    def assert_clean(self, log_from: int = 0) -> None:
        """Nothing runs, nothing is held, nothing crashed; the log is read from ``log_from`` on."""
        assert self.alive, self.log
        self.idle_metrics()
        assert self.get("/ready")[0] == 200
        log = self.log[log_from:]
        assert "Traceback" not in log, log
        assert "fault of the server" not in log, log


_ZERO_WHEN_IDLE = (
    "millrace_requests_running",
    "millrace_requests_waiting",
    "millrace_turns_in_flight",
)


def run_millrace(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``millrace serve`` to its end: for starts that must fail."""
    return subprocess.run(
        _command(arguments),
        env=_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_S,
        check=False,
    )
