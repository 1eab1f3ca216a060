"""Tuning: adapters by their definition, checkpoints against transformers, runs on tiny models."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from engine.errors import CheckpointError, ConfigError
from engine.train.load import load_model
from engine.train.model import Qwen3
from engine.train.tuning.dataset import Summary
from engine.train.tuning.loop import StepReport
from engine.train.tuning.lora import adapters, add_adapters, merge_adapters, write_adapter
from engine.train.tuning.plan import LINEAR_MODULES, Method, Plan, TuneSettings
from engine.train.tuning.run import tune
from engine.train.tuning.weights import write_checkpoint
from tests.engine.checkpoints import Shape, all_logprobs, load_float32, make
from tests.engine.harness import Engine
from tests.engine.tokenizer_files import byte_level

IDS = torch.randint(0, 131, (40,), generator=torch.Generator().manual_seed(1))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def logits(model: Qwen3) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS)
    return found


def adapted(model: Qwen3, targets: tuple[str, ...] = LINEAR_MODULES) -> Qwen3:
    add_adapters(model, rank=3, alpha=6.0, rslora=False, target_modules=targets)
    return model


def shake(model: Qwen3) -> None:
    """Adapters that matter to the logits."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            adapter.lora_B.normal_(0, 0.2, generator=generator)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(tied=False, num_heads=6, num_kv_heads=3, head_dim=16),
        Shape(tied=False, max_shard_size="60KB", num_kv_heads=1),
        Shape(dtype=torch.bfloat16, num_kv_heads=4),
        Shape(rope=YARN, max_positions=128),
    ],
    ids=["tied", "untied", "sharded", "bfloat16", "yarn"],
)
def test_loaded_model_has_the_logits_of_transformers(tmp_path: Path, shape: Shape) -> None:
    directory, _ = make(tmp_path / "base", shape)
    model = load_model(directory, torch.float32)
    theirs = load_float32(directory)
    ours = logits(model).log_softmax(-1)
    torch.testing.assert_close(ours, all_logprobs(theirs, IDS.tolist()), atol=2e-4, rtol=1e-4)
    # Written again, changed, it is what transformers reads, in the same files and types.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    (tmp_path / "out").mkdir()
    write_checkpoint(model, directory, tmp_path / "out")
    names = {path.name for path in directory.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for path in directory.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "out" / path.name)
        assert path.stat().st_mode == (tmp_path / "out" / path.name).stat().st_mode
        assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
            n: (t.dtype, t.shape) for n, t in before.items()
        }
        for name, tensor in before.items():
            want = (tensor.float() * 1.1).to(tensor.dtype)
            torch.testing.assert_close(after[name], want, atol=0, rtol=1e-6)
    again = load_float32(tmp_path / "out")
    if shape.dtype is torch.float32:
        torch.testing.assert_close(
            logits(model).log_softmax(-1), all_logprobs(again, IDS.tolist()), atol=3e-4, rtol=1e-4
        )


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    directory, _ = make(tmp_path / "base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(CheckpointError, match="LlamaForCausalLM"):
        load_model(directory, torch.float32)


def test_new_adapter_changes_nothing(tmp_path: Path) -> None:
    directory, _ = make(tmp_path / "base")
    plain = logits(load_model(directory, torch.float32))
    assert torch.equal(logits(adapted(load_model(directory, torch.float32))), plain)


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_the_definition(tmp_path: Path, rslora: bool) -> None:
    directory, theirs = make(tmp_path / "base", Shape(tied=False))
    model = load_model(directory, torch.float32)
    add_adapters(model, rank=4, alpha=6.0, rslora=rslora, target_modules=LINEAR_MODULES)
    shake(model)
    scale = 6.0 / 2 if rslora else 6.0 / 4
    parts = {name: (a.lora_A.detach(), a.lora_B.detach()) for name, _, a in adapters(model)}
    assert len(parts) == 3 * 7

    # The adapter applied beside the matrices of transformers, as the paper's equation 3 has it.
    def beside(below: Tensor, above: Tensor) -> Any:
        return lambda _, inputs, output: output + scale * (inputs[0] @ below.T) @ above.T

    for name, (below, above) in parts.items():
        theirs.get_submodule(name).register_forward_hook(beside(below, above))
    want = all_logprobs(theirs, IDS.tolist())
    torch.testing.assert_close(logits(model).log_softmax(-1), want, atol=3e-4, rtol=1e-4)
    applied = logits(model)
    merge_adapters(model)
    assert torch.equal(logits(model), applied)
    stored = load_file(directory / "model.safetensors")
    for name, parameter in model.named_parameters():
        base = stored[name]
        if (part := parts.get(name.removesuffix(".weight"))) is not None:
            base = base + scale * part[1] @ part[0]
        torch.testing.assert_close(parameter.detach(), base, atol=1e-6, rtol=1e-5)


def adapter_of(directory: Path, base: Path, targets: tuple[str, ...] = LINEAR_MODULES) -> Qwen3:
    model = adapted(load_model(base, torch.float32), targets)
    shake(model)
    write_adapter(
        model, directory, base="my/base", rank=3, alpha=6.0, rslora=False, target_modules=targets
    )
    return model


def test_adapter_has_the_names_and_shapes_of_peft(tmp_path: Path) -> None:
    base, theirs = make(tmp_path / "base", Shape(num_layers=2))
    adapter_of(tmp_path / "adapter", base, ("q_proj", "down_proj"))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    want = {}
    for layer in range(2):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{part}"
            num_out, num_in = theirs.get_submodule(name).weight.shape
            want[f"base_model.model.{name}.lora_A.weight"] = (3, num_in)
            want[f"base_model.model.{name}.lora_B.weight"] = (num_out, 3)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == want
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6.0, False)
    assert config["target_modules"] == ["q_proj", "down_proj"]
    assert config["base_model_name_or_path"] == "my/base"


def engine(model: Path, adapter: Path | None = None) -> Engine:
    return Engine(model, kv_memory_bytes=1 << 20, adapter=adapter and str(adapter))


@pytest.mark.parametrize("tied", [True, False])
def test_served_adapter_answers_as_the_merged_model(tmp_path: Path, tied: bool) -> None:
    base, _ = make(tmp_path / "base", Shape(tied=tied))
    model = adapter_of(tmp_path / "adapter", base)
    merge_adapters(model)
    (tmp_path / "merged").mkdir()
    write_checkpoint(model, base, tmp_path / "merged")
    prompt = IDS[:12].tolist()
    plain, merged, served = (
        greedy(engine(*paths), prompt)
        for paths in ((base,), (tmp_path / "merged",), (base, tmp_path / "adapter"))
    )
    assert served == merged != plain


def greedy(one: Engine, prompt: list[int]) -> list[int]:
    request_id = one.add(prompt, max_tokens=16, ignore_eos=True)
    one.run()
    return one.answers[request_id].token_ids


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base, _ = make(tmp_path / "base")
    other, _ = make(tmp_path / "other", Shape(seed=1))
    wider, _ = make(tmp_path / "wider", Shape(intermediate_size=96))
    shallow, _ = make(tmp_path / "shallow", Shape(num_layers=2))
    adapter_of(tmp_path / "adapter", base)
    with pytest.raises(CheckpointError, match="trained on my/base with other weights"):
        engine(other, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path), path)  # as other tools write it: without a fingerprint
    engine(other, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"must be \[96, 3\]; it was trained on my/base"):
        engine(wider, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="belongs to no matrix of this model"):
        engine(shallow, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("peft_type", "LOHA", "must be LORA"),
        ("use_dora", True, "use_dora"),
        ("bias", "all", "biases"),
        ("r", "four", "positive integer"),
        ("lora_alpha", None, "must be a number"),
    ],
)
def test_other_adapters_are_refused(tmp_path: Path, field: str, value: object, words: str) -> None:
    base, _ = make(tmp_path / "base")
    adapter_of(tmp_path / "adapter", base)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=words):
        engine(base, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="is not an adapter"):
        engine(base, base)


class Told:
    """A watcher that remembers, and stops the run when it is told to."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.summary: Summary | None = None
        self.plan: Plan | None = None
        self.before = 0.0
        self.reports: list[StepReport] = []
        self.stop = threading.Event()
        self._stop_after = stop_after

    def stage(self, text: str, fraction: float) -> None:
        assert text
        assert 0 <= fraction <= 1

    def checked(self, summary: Summary) -> None:
        assert self.plan is None
        self.summary = summary

    def planned(self, plan: Plan, heldout: float, estimate_s: float, num_trained: int) -> None:
        assert estimate_s > 0
        assert num_trained > 0
        self.plan, self.before = plan, heldout

    def stepped(self, report: StepReport) -> None:
        self.reports.append(report)
        if report.step == self._stop_after:
            self.stop.set()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory, _ = make(tmp_path / "base", Shape(vocab_size=520, tied=False, max_shard_size="90KB"))
    return byte_level(directory)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    turns = [
        [
            {"role": "user", "content": f"question {i % 7} {i}"},
            {"role": "assistant", "content": f"answer {i % 7} the quick brown fox"},
        ]
        for i in range(24)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return path


@pytest.mark.parametrize("method", [Method.FULL, Method.LORA])
def test_tuning_lowers_the_held_out_loss(
    tmp_path: Path, base: Path, data: Path, method: Method
) -> None:
    told = Told()
    settings = TuneSettings(
        model=str(base), data=data, out=tmp_path / "out", method=method, epochs=20,
        batch_tokens=200, learning_rate=3e-3 if method is Method.FULL else 1e-2,
    )  # fmt: skip
    outcome = tune(settings, told)
    assert outcome.before == told.before
    assert outcome.after < outcome.before / 2
    measured = {one.step: one.heldout for one in told.reports if one.heldout is not None}
    assert outcome.after == min(measured.values()) == measured[outcome.best_step]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    # What was written is what was measured.
    again = Told()
    tune(
        TuneSettings(model=str(tmp_path / "out"), data=data, out=tmp_path / "more", epochs=0.1),
        again,
    )
    assert again.before == pytest.approx(outcome.after, abs=1e-3)
    record = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert record["outcome"]["after"] == outcome.after
    frozen = (
        load_file(next(base.glob("*00001-of*"))),
        load_file(next((tmp_path / "out").glob("*00001-of*"))),
    )
    name = "model.embed_tokens.weight"
    if name in frozen[0]:
        assert torch.equal(frozen[0][name], frozen[1][name]) is (method is Method.LORA)


def test_stopped_run_keeps_the_best(tmp_path: Path, base: Path, data: Path) -> None:
    told = Told(stop_after=3)
    settings = TuneSettings(
        model=str(base), data=data, out=tmp_path / "out", epochs=50, learning_rate=1e-3
    )
    outcome = tune(settings, told, told.stop)
    assert outcome.stopped
    assert outcome.steps == 4  # the step under way when it was told
    assert outcome.after < outcome.before
    Qwen3ForCausalLM.from_pretrained(tmp_path / "out")


def test_run_ends_when_nothing_gets_better(tmp_path: Path, base: Path, data: Path) -> None:
    settings = TuneSettings(
        model=str(base), data=data, out=tmp_path / "out", epochs=400, learning_rate=0.5, patience=2
    )
    outcome = tune(settings, Told())
    assert outcome.converged
    assert outcome.steps < 400


def test_diverging_run_is_an_error(tmp_path: Path, base: Path, data: Path) -> None:
    settings = TuneSettings(model=str(base), data=data, out=tmp_path / "out", learning_rate=1e30)
    with pytest.raises(ConfigError, match=r"the loss is nan .* a lower one is needed"):
        tune(settings, Told())
    assert not (tmp_path / "out").exists()


def test_output_is_never_written_over_something_else(
    tmp_path: Path, base: Path, data: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is there already"):
        tune(TuneSettings(model=str(base), data=data, out=out), Told())
    with pytest.raises(ConfigError, match="was not made by tuning"):
        tune(TuneSettings(model=str(base), data=data, out=out, overwrite=True), Told())
    with pytest.raises(ConfigError, match="is a file"):
        tune(TuneSettings(model=str(base), data=data, out=data), Told())
    assert (out / "letter.txt").read_text() == "dear"


def test_longer_than_the_context_is_refused(tmp_path: Path, base: Path, data: Path) -> None:
    settings = TuneSettings(model=str(base), data=data, out=tmp_path / "out", max_len=513)
    with pytest.raises(ConfigError, match="max_len is 513; the model's context has 512"):
        tune(settings, Told())
