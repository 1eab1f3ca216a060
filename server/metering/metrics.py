"""Prometheus metrics of one server process; units are base units, names start with ``millrace_``.

The turn's figures come from the server, the engine's from its statistics frames. Labels are few and
bounded (dialect, status): never a model's text, a key or an id.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine import EngineStats, Recoveries

__all__ = ["Metrics"]

_FIRST_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_TURN_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_LOOP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The server's metrics, in a registry of their own so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._make_turn_metrics()
        self._make_loop_metrics()
        self._make_held_metrics()
        self._engine = _EngineMetrics(self.registry)
        self._recoveries = _RecoveryMetrics(self.registry)

    def _make_turn_metrics(self) -> None:
        self._turns_started = self._counter("turns_started", "Turns begun.", ["dialect"])
        self._turns_ended = self._counter("turns", "Turns ended.", ["dialect", "status"])
        self._turns_in_flight = Gauge(
            "millrace_turns_in_flight", "Turns that this server makes now.", registry=self.registry
        )
        self._turn_prompt = self._counter("turn_prompt_tokens", "Prompt tokens of ended turns.")
        self._turn_cached = self._counter(
            "turn_cached_tokens", "Prompt tokens of ended turns taken from the prefix cache."
        )
        self._turn_completion = self._counter(
            "turn_completion_tokens", "Tokens generated for ended turns."
        )
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to the first token of its answer.",
            _FIRST_TOKEN_S,
        )
        self._inter_token_s = self._histogram(
            "inter_token_seconds", "Between two tokens of one answer.", _INTER_TOKEN_S
        )
        self._refused = self._counter("turns_refused", "Turns not let in.", ["code"])
        self._waiting = Gauge(
            "millrace_turns_waiting", "Turns without a token yet.", registry=self.registry
        )
        self._waited_s = self._histogram(
            "turn_wait_seconds", "From a turn's admission to its first token.", _FIRST_TOKEN_S
        )
        self._connections = Gauge(
            "millrace_connections", "Open connections.", registry=self.registry
        )
        self._connections_refused = self._counter(
            "connections_refused", "Connections for which there was no room.", ["limit"]
        )
        self._connections_cut = self._counter(
            "connections_cut", "Connections cut: slow_head, slow_reader.", ["reason"]
        )
        self._turn_s = self._histogram(
            "turn_duration_seconds", "From a turn's begin to its terminal event.", _TURN_S
        )

        self._disconnects = self._counter(
            "disconnects",
            "Turns whose last client left before their end, by contract and what came of it.",
            ["contract", "outcome"],
        )
        self._takeovers = self._counter(
            "takeovers", "Turns taken over from dead servers.", ["outcome"]
        )

    def _make_loop_metrics(self) -> None:
        self._loop_lag_s = self._histogram(
            "event_loop_lag_seconds", "How late the event loop ran a timer.", _LOOP_S
        )
        self._loop_blocked_s = self._histogram(
            "event_loop_blocked_seconds",
            "The part of a timer's delay for which this process itself held the event loop.",
            _LOOP_S,
        )
        self._loop_blocked_max_s = Gauge(
            "millrace_event_loop_blocked_max_seconds",
            "The longest that this process itself held the event loop since it started.",
            registry=self.registry,
        )
        self._longest_blocked_s = 0.0

    def _make_held_metrics(self) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"millrace_{name}", text, registry=self.registry)

        self._tasks = gauge("event_loop_tasks", "Tasks of the event loop that have not ended.")
        self._journals = gauge("journals_open", "Event logs held in memory.")
        self._websockets = gauge("websockets_open", "Open WebSockets.")

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"millrace_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"millrace_{name}", text, buckets=buckets, registry=self.registry)

    def held(self, *, tasks: int, journals: int, websockets: int) -> None:
        """Set what the process holds now; an idle server always comes back to the same."""
        self._tasks.set(tasks)
        self._journals.set(journals)
        self._websockets.set(websockets)

    def turn_started(self, dialect: str) -> None:
        """Count a turn that was accepted."""
        self._turns_started.labels(dialect).inc()
        self._turns_in_flight.inc()

    def turn_left(self) -> None:
        """Count a turn that this server has no more: it ended, or goes on at another."""
        self._turns_in_flight.dec()

    def refused(self, code: str) -> None:
        """Count a turn that was not let in, by its error's code."""
        self._refused.labels(code).inc()

    def waiting(self, count: int) -> None:
        """Set the number of turns without a token."""
        self._waiting.set(count)

    def waited(self, seconds: float) -> None:
        """Record how long a turn that was let in waited for its first token."""
        self._waited_s.observe(seconds)

    def connections(self, count: int) -> None:
        """Set the number of open connections."""
        self._connections.set(count)

    def connection_refused(self, limit: str) -> None:
        """Count a connection that was over a limit: all, address."""
        self._connections_refused.labels(limit).inc()

    def connection_cut(self, reason: str) -> None:
        """Count a connection that was cut: slow_head, slow_reader."""
        self._connections_cut.labels(reason).inc()

    def first_token(self, seconds: float) -> None:
        """Record the time from a request's arrival to its first token."""
        self._first_token_s.observe(seconds)

    def inter_token(self, seconds: float, count: int) -> None:
        """Record ``count`` tokens that came together ``seconds`` after the one before them."""
        for _ in range(count):
            self._inter_token_s.observe(seconds / count)

    def turn_ended(
        self,
        *,
        dialect: str,
        status: str,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        duration_s: float,
    ) -> None:
        """Count a turn's end; ``status`` is completed, incomplete, failed or cancelled."""
        self._turns_ended.labels(dialect, status).inc()
        self._turn_prompt.inc(prompt_tokens)
        self._turn_cached.inc(cached_tokens)
        self._turn_completion.inc(completion_tokens)
        self._turn_s.observe(duration_s)

    def disconnected(self, contract: str, outcome: str) -> None:
        """Count a turn whose last client left.

        ``outcome`` is ran_on, cancelled, resumed (somebody came back) or finished (it ended first).
        """
        self._disconnects.labels(contract, outcome).inc()

    def taken_over(self, outcome: str) -> None:
        """Count a turn taken over from a dead server; ``outcome`` is resumed or failed."""
        self._takeovers.labels(outcome).inc()

    def engine_stats(self, stats: EngineStats) -> None:
        """Take over the engine's latest figures; its counters go on over restarts."""
        self._engine.update(stats)

    def engine_recoveries(self, recoveries: Recoveries) -> None:
        """Take over what became of engines that died."""
        self._recoveries.update(recoveries)

    def loop_lag(self, seconds: float, blocked_s: float | None = None) -> None:
        """Record how late a timer ran, and how much of it this process caused."""
        self._loop_lag_s.observe(seconds)
        if blocked_s is not None:
            self._loop_blocked_s.observe(blocked_s)
            self._longest_blocked_s = max(self._longest_blocked_s, blocked_s)
            self._loop_blocked_max_s.set(self._longest_blocked_s)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)


class _EngineMetrics:
    """The engine's figures."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"millrace_{name}", text, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"millrace_{name}", text, registry=registry)

        self._running = gauge("requests_running", "Sequences the engine is computing.")
        self._waiting = gauge("requests_waiting", "Sequences waiting for room in the engine.")
        self._blocks = gauge("kv_blocks", "Blocks of the KV cache.")
        self._blocks_free = gauge("kv_blocks_free", "KV blocks that no sequence holds.")
        self._blocks_cached = gauge("kv_blocks_cached", "Free KV blocks with a reusable prefix.")
        self._usage = gauge("kv_usage_ratio", "Part of the KV blocks that sequences hold, 0 to 1.")
        self._step_s = gauge("engine_step_seconds", "Duration of the engine's latest step.")
        self._counters = {
            "steps": counter("engine_steps", "Steps of the engine."),
            "dropped_steps": counter(
                "dropped_steps", "Steps of the engine left undone for a newcomer's first token."
            ),
            "busy_s": counter("engine_busy_seconds", "Time the engine spent in steps."),
            "prompt_tokens": counter(
                "prompt_tokens", "Prompt tokens computed; those from the prefix cache not counted."
            ),
            "generation_tokens": counter("generation_tokens", "Tokens generated."),
            "preemptions": counter("preemptions", "Sequences set back to make room."),
            "aborts": counter("aborted_sequences", "Sequences aborted while the engine had them."),
            "abort_steps": counter(
                "abort_steps", "Steps for which aborted sequences still held their blocks."
            ),
            "late_aborts": counter("late_aborts", "Aborts that took more than two steps."),
            "queried_tokens": counter(
                "prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache."
            ),
            "cached_tokens": counter(
                "prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."
            ),
        }
        self._last = EngineStats()

    def update(self, stats: EngineStats) -> None:
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._blocks.set(stats.num_blocks)
        self._blocks_free.set(stats.free_blocks)
        self._blocks_cached.set(stats.cached_blocks)
        used = stats.num_blocks - stats.free_blocks
        self._usage.set(used / stats.num_blocks if stats.num_blocks else 0.0)
        self._step_s.set(stats.step_s)
        for name, counter in self._counters.items():
            counter.inc(getattr(stats, name) - getattr(self._last, name))
        self._last = stats


class _RecoveryMetrics:
    """What became of engines that died: totals that are handed over as they stand."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"millrace_engine_{name}", text, registry=registry)

        self._counters = {
            "restarts": counter("restarts", "New engine processes after the first."),
            "hangs": counter("hangs", "Engine processes killed because they came no further."),
            "replayed": counter(
                "replayed_requests", "Sequences handed on from a dead engine to the next."
            ),
            "given_up": counter(
                "given_up_requests", "Sequences ended because engine after engine died."
            ),
            "recovered": counter("recoveries", "Engine deaths after which tokens came again."),
            "recovery_s": counter(
                "recovery_seconds", "Time from an engine's last sign of life to the next token."
            ),
        }
        self._last = Recoveries()

    def update(self, recoveries: Recoveries) -> None:
        for name, counter in self._counters.items():
            counter.inc(getattr(recoveries, name) - getattr(self._last, name))
        self._last = recoveries
