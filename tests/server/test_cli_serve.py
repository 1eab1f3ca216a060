"""``millrace serve``: options, the errors of a start, and the ways to stop."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from typer.testing import CliRunner

import server.cli.serve
from engine import Device, Dtype, EngineConfig, KvCacheDtype, ModelInfo
from server.__main__ import app
from server.cli.banner import banner
from server.cli.serve import StartError, bind
from server.settings import ServerSettings
from server.store import StoreKind
from tests.server.process import needs_model, serving


def _recorder(seen: list[Any]) -> Callable[[ServerSettings, EngineConfig], int]:
    def record(settings: ServerSettings, config: EngineConfig) -> int:
        seen.extend((settings, config))
        return 0

    return record


class TestOptions:
    OPTIONS = (
        ("port", "81"),
        ("host", "0.0.0.0"),
        ("dtype", "float16"),
        ("device", "cpu"),
        ("kv_cache_dtype", "fp8"),
        ("max_model_len", "512"),
        ("kv_memory", "64MiB"),
        ("max_num_tokens", "100"),
        ("max_num_seqs", "9"),
        ("steps_ahead", "1"),
        ("num_threads", "3"),
        ("redis_url", "redis://r:1"),
        ("drain_seconds", "1.5"),
        ("api_key_file", "/keys"),
        ("served_model_name", "fine"),
    )

    def check(self, settings: ServerSettings, config: EngineConfig) -> None:
        assert config == EngineConfig(
            model="some/model",
            served_name="fine",
            dtype=Dtype.FLOAT16,
            device=Device.CPU,
            kv_cache_dtype=KvCacheDtype.FP8,
            max_model_len=512,
            kv_memory_bytes=64 << 20,
            max_num_tokens=100,
            max_num_seqs=9,
            steps_ahead=1,
            num_threads=3,
        )
        assert (settings.host, settings.port) == ("0.0.0.0", 81)
        assert settings.redis_url == "redis://r:1"
        assert settings.drain_s == 1.5
        assert settings.api_key_file == Path("/keys")

    def test_on_the_command_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(server.cli.serve, "serve", _recorder(seen))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.OPTIONS]
        result = CliRunner().invoke(app, ["serve", "some/model", *flags])
        assert result.exit_code == 0, result.output
        self.check(*seen)

    def test_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(server.cli.serve, "serve", _recorder(seen))
        variables = {f"MILLRACE_{name.upper()}": value for name, value in self.OPTIONS}
        result = CliRunner().invoke(
            app, ["serve"], env={"MILLRACE_MODEL": "some/model"} | variables
        )
        assert result.exit_code == 0, result.output
        self.check(*seen)

    def test_flags(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(server.cli.serve, "serve", _recorder(seen))
        variables = {"MILLRACE_BATCH_INVARIANT": "1"}
        for arguments, env in ((["--batch-invariant"], {}), ([], variables)):
            assert CliRunner().invoke(app, ["serve", *arguments], env=env).exit_code == 0
            assert seen[-1] == EngineConfig(batch_invariant=True)
        variables = {"MILLRACE_CUDA_GRAPHS": "0"}
        for arguments, env in ((["--no-cuda-graphs"], {}), ([], variables)):
            assert CliRunner().invoke(app, ["serve", *arguments], env=env).exit_code == 0
            assert seen[-1] == EngineConfig(cuda_graphs=False)

    def test_defaults(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(server.cli.serve, "serve", _recorder(seen))
        assert CliRunner().invoke(app, ["serve"]).exit_code == 0
        assert seen == [ServerSettings(), EngineConfig()]

    def test_version(self) -> None:
        result = CliRunner().invoke(app, ["--version"])
        assert result.exit_code == 0
        assert result.output.startswith("millrace ")


def engine_pids() -> set[int]:
    """Engine processes of this user, whoever's children they are by now."""
    found = set()
    for process in psutil.process_iter(["cmdline", "pid"]):
        command = process.info["cmdline"] or []
        if command[1:3] == ["-m", "engine"]:
            found.add(process.info["pid"])
    return found


class TestStartErrors:
    def refused(self, *arguments: str) -> str:
        result = CliRunner().invoke(app, ["serve", *arguments])
        assert result.exit_code == 2, result.output
        lines = result.stderr.splitlines()
        errors = [line for line in lines if line.startswith("millrace: error: ")]
        assert len(errors) == 1
        assert not any("Traceback" in line for line in lines)
        return errors[0]

    def test_no_such_directory(self) -> None:
        assert "there is no directory './nowhere'" in self.refused("./nowhere", "--port=0")

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        assert "no config.json" in self.refused(str(tmp_path), "--port=0")

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert re.search("tokenizer|model_type|architect", self.refused(str(tmp_path), "--port=0"))

    def test_broken_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        assert str(tmp_path) in self.refused(str(tmp_path), "--port=0")

    @pytest.mark.parametrize(
        ("flag", "reason"),
        [
            ("--kv-memory=lots", "'lots' is not a size"),
            ("--kv-memory=-1", "not a size"),
            ("--max-num-tokens=0", "max_num_tokens is 0; it must be at least 1"),
            ("--max-num-seqs=-3", "max_num_seqs is -3"),
            ("--steps-ahead=2", "steps_ahead is 2; it must be 0 or 1"),
            ("--max-model-len=0", "max_model_len is 0"),
            ("--num-threads=0", "num_threads is 0"),
            ("--api-key-file=/no/such/file", "cannot read the key file /no/such/file"),
            ("--host=no-such-host.invalid", "'no-such-host.invalid' is not known"),
            ("--host=192.0.2.1", "cannot listen on 192.0.2.1"),
        ],
    )
    def test_impossible_settings(self, flag: str, reason: str) -> None:
        assert reason in self.refused("./nowhere", "--port=0", flag)

    @pytest.mark.parametrize("flag", ["--port=99999", "--dtype=int3", "--device=abacus", "--what"])
    def test_unknown_options(self, flag: str) -> None:
        result = CliRunner().invoke(app, ["serve", flag])
        assert result.exit_code == 2
        assert flag.partition("=")[0] in result.stderr

    def test_port_in_use_is_told_before_the_model_is_looked_for(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            message = self.refused("./nowhere", f"--port={port}")
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in message

    @needs_model
    def test_redis_out_of_reach(self) -> None:
        before = engine_pids()
        message = self.refused("--port=0", "--redis-url=redis://user:secret@127.0.0.1:1/0")
        assert "127.0.0.1:1" in message
        assert "secret" not in message
        assert engine_pids() <= before

    @needs_model
    def test_redis_address_that_is_none(self) -> None:
        assert "Redis" in self.refused("--port=0", "--redis-url=http://x")


class TestBinding:
    def test_free_port(self) -> None:
        (one,) = bind("127.0.0.1", 0)
        with one:
            assert one.getsockname()[1] > 0
            with socket.socket() as probe:
                assert probe.connect_ex(one.getsockname()) != 0  # bound, but nobody is served yet

    def test_a_port_that_was_just_used(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)):
                listener.accept()[0].close()  # this side goes into TIME_WAIT
        (one,) = bind("127.0.0.1", port)
        one.close()

    def test_every_address_of_a_name_gets_the_same_port(self) -> None:
        try:
            sockets = bind("", 0)
        except StartError:
            pytest.skip("this machine has no second address family")
        ports = {one.getsockname()[1] for one in sockets}
        for one in sockets:
            one.close()
        assert len(ports) == 1


class TestBanner:
    INFO = ModelInfo(
        name="pebble",
        max_model_len=2048,
        vocab_size=8,
        eos_token_ids=(1,),
        num_parameters=10_495_000,
        dtype="bfloat16",
        device="cpu",
        block_size=16,
        num_blocks=9,
    )

    def show(self, tmp_path: Path, store: StoreKind, host: str = "127.0.0.1") -> str:
        return banner(ServerSettings(page_dir=tmp_path), (host, 81), self.INFO, store, "h:6379")

    def test_what_is_said(self, tmp_path: Path) -> None:
        shown = self.show(tmp_path, StoreKind.REDIS)
        assert "http://127.0.0.1:81/v1" in shown
        assert "pebble: 10.5M parameters, bfloat16 on cpu, context 2,048 tokens" in shown
        assert "Redis at h:6379" in shown
        assert "make page" in shown
        (tmp_path / "index.html").touch()
        shown = self.show(tmp_path, StoreKind.REDIS)
        assert "http://127.0.0.1:81/\n" in shown

    def test_memory_is_said_loudly(self, tmp_path: Path) -> None:
        assert "IN MEMORY ONLY" in self.show(tmp_path, StoreKind.MEMORY)

    @pytest.mark.parametrize(
        ("host", "url"), [("0.0.0.0", "http://localhost:81"), ("::1", "http://[::1]:81")]
    )
    def test_addresses_can_be_clicked(self, tmp_path: Path, host: str, url: str) -> None:
        assert f"{url}/v1" in self.show(tmp_path, StoreKind.REDIS, host)


LONG = {
    "model": "pebble",
    "messages": [{"role": "user", "content": "Hello"}],
    "stream": True,
    "ignore_eos": True,
    "temperature": 0,
}


@needs_model
class TestLife:
    async def test_it_serves_and_drains(self) -> None:
        async with serving() as (process, url), aiohttp.ClientSession() as client:
            async with client.get(f"{url}/ready") as ready:
                assert ready.status == 200
            children = psutil.Process(process.pid).children(recursive=True)
            body = {**LONG, "max_tokens": 40}
            async with client.post(f"{url}/v1/chat/completions", json=body) as response:
                assert response.status == 200
                first = await response.content.readline()
                process.send_signal(signal.SIGTERM)
                rest = await response.read()
            assert first.startswith(b"id: chatcmpl-")
            assert b'"finish_reason":"length"' in rest
            assert rest.endswith(b"data: [DONE]\n\n")
            assert await process.wait() == 0
            _, alive = psutil.wait_procs(children, timeout=10)
            assert alive == []

    async def test_a_second_signal_cuts_what_runs(self) -> None:
        async with serving() as (process, url), aiohttp.ClientSession() as client:
            async with client.post(f"{url}/v1/chat/completions", json=LONG) as response:
                await response.content.readline()
                process.send_signal(signal.SIGINT)
                async with client.get(f"{url}/ready") as ready:
                    assert ready.status == 503
                process.send_signal(signal.SIGINT)
                rest = await response.read()
            assert b'"finish_reason":"length"' not in rest
            assert await process.wait() == 0

    async def test_stopped_while_it_starts(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server", "serve", "--port=0"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        await process.stderr.readline()  # "importing torch", or what else is first
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        assert process.returncode == 130
        assert b"ready" not in out
        assert b"Traceback" not in err
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
