"""What is kept of GPU measurements, how large random models come about, and open-loop load."""

from __future__ import annotations

import asyncio
import csv
from pathlib import Path

import pytest
import torch
from aiohttp import web

from engine.loader import WeightSource
from tests.bench.checkpoints import Shape, make_filled, make_hollow, tensors
from tests.bench.open_loop import Promise, figures_of, offer
from tests.bench.serve import Answer, free_port
from tests.gpu import keep
from tests.gpu.goals import GOALS
from tests.gpu.keep import BEGIN, END, README, NotKept, kept_rows, with_gpu_tables
from tests.gpu.weights import bytes_of, made_up_weights

H200 = "NVIDIA H200, 140 GiB"
SHAPE = Shape(64, 2, 4, 2, 16, 96, 500, tied=False)


def measured(folder: Path, device: str = H200, **figures: str) -> Path:
    """A folder with the row of one goal."""
    folder.mkdir()
    row = {"date": "2026-01-02", "commit": "abc", "device": device, "why not": "", "took_s": "1"}
    row |= {"row": "8b-fp8/decode-1@1024", **figures}
    with (folder / "gpu-engine.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    return folder


def test_the_readme_has_what_was_measured() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_gpu_tables(text, kept_rows()) == text
    if not kept_rows():
        assert "Nothing was measured on a GPU yet" in text


def test_kept_figures_are_no_dry_ones() -> None:
    assert not any("dry" in row["device"] for row in kept_rows().values())


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["dry run on a CPU"], "a dry run and mean nothing"),
        ([H200, "NVIDIA H100, 79 GiB"], "several devices: NVIDIA H100"),
    ],
)
def test_figures_that_are_refused(tmp_path: Path, devices: list[str], message: str) -> None:
    folders = [measured(tmp_path / str(n), device) for n, device in enumerate(devices)]
    with pytest.raises(NotKept, match=message):
        keep.keep(folders, tmp_path / "results")
    with pytest.raises(NotKept, match="holds no gpu"):
        keep.keep([tmp_path], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_figures_that_are_kept(tmp_path: Path) -> None:
    results = tmp_path / "results"
    first = measured(tmp_path / "a", step_ms="2.5", tokens_per_s="400")
    later = measured(tmp_path / "b", step_ms="2.1", tokens_per_s="476")
    lost = measured(tmp_path / "c", step_ms="", **{"why not": "left out: no time left"})
    keep.keep([first, later, lost], results)
    rows = keep.read_rows(results)
    (goal,) = [goal for goal in GOALS if goal.about == "8B, one request, FP8"]
    assert goal.measured(rows) == 2.1
    text = with_gpu_tables(f"before\n{BEGIN}\nold\n{END}\nafter\n", rows)
    assert text.startswith(f"before\n{BEGIN}\nOn one {H200} (2026-01-02, commit abc)")
    assert "| 8B, one request, FP8 | ≤ 2.25 ms | 2.1 ms | met |" in text
    assert text.count("not measured") == len(GOALS) - 1
    assert text.endswith(f"{END}\nafter\n")
    keep.draw(rows, tmp_path / "gpu.svg")
    assert b"<svg" in (tmp_path / "gpu.svg").read_bytes()


def test_ratios_of_goals() -> None:
    rows = {
        "engine/8b-bf16/decode-1@1024": {"step_ms": "4"},
        "engine/8b-fp8/decode-1@1024": {"step_ms": "2"},
        "engine/8b-bf16/memory": {"GiB": "16"},
        "engine/8b-fp8/memory": {"GiB": "12"},
    }
    found = {goal.about: (goal, goal.measured(rows)) for goal in GOALS if goal.over}
    faster, value = found["8B, one request, FP8 against bfloat16"]
    assert value == 2.0
    assert faster.is_met(value)
    smaller, value = found["8B, memory of the weights, FP8 against bfloat16"]
    assert value == 0.75
    assert not smaller.is_met(value)


def test_a_hollow_checkpoint_gets_its_weights_while_loading(tmp_path: Path) -> None:
    folder = make_hollow(SHAPE, tmp_path)
    name, sizes = "model.layers.1.mlp.up_proj.weight", (96, 64)
    assert not WeightSource(folder).take(name, sizes).any()
    with made_up_weights():
        weight = WeightSource(folder).take(name, sizes)
    assert weight.float().std().item() == pytest.approx(64**-0.5, rel=0.1)
    large = make_hollow(SHAPE._replace(vocab_size=200_000, hidden_size=1024), tmp_path)
    stat = (large / "model.safetensors").stat()
    assert stat.st_size > 800_000_000
    assert stat.st_blocks * 512 < 1 << 20


def test_a_filled_checkpoint_holds_numbers_everywhere(tmp_path: Path) -> None:
    source = WeightSource(make_filled(SHAPE, tmp_path))
    for name, sizes in tensors(SHAPE):
        assert source.take(name, sizes).float().abs().max() > 0
    source.finish()


def test_each_memory_is_counted_once() -> None:
    whole = torch.zeros(10, 4)
    assert bytes_of([whole, whole[2:5], {"a": (torch.zeros(3),)}, "text", None]) == 160 + 12


PROMISE = Promise(first_token_s=0.5, between_tokens_s=0.05, tokens=3)


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (Answer(0.5, [0.02, 0.08], 3), True),
        (Answer(0.6, [0.01, 0.01], 3), False),
        (Answer(0.1, [0.05, 0.06], 3), False),
        (Answer(0.1, [0.01], 2), False),
    ],
)
def test_a_kept_promise(answer: Answer, good: bool) -> None:
    assert PROMISE.kept(answer) is good


async def test_open_loop_load_counts_what_is_refused_lost_and_late() -> None:
    """The server answers one of four requests, refuses, breaks and forgets the others."""
    requests = 0
    never = asyncio.Event()

    async def complete(request: web.Request) -> web.StreamResponse:
        nonlocal requests
        requests += 1
        kind = requests % 4
        if kind == 1:
            return web.Response(status=429)
        if kind == 2:
            return web.Response(status=500)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for token in range((await request.json())["max_tokens"]):
            await response.write(b'data: {"choices": [{"token_ids": [%d]}]}\n\n' % token)
        if kind == 3:
            await never.wait()
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        served = await offer(
            f"http://127.0.0.1:{port}", "any", rate=200.0, requests=8, vocab=1000,
            prompt_tokens=4, output_tokens=3, patience_s=2.0,
        )  # fmt: skip
    finally:
        never.set()
        await runner.cleanup()
    assert (len(served.answers), served.refused, served.failed) == (2, 2, 4)
    figures = figures_of(served, PROMISE._replace(first_token_s=30, between_tokens_s=30))
    assert figures["good %"] == 25.0
    assert figures["refused"] == 2
