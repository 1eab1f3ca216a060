"""Training runs: learning, resuming, budgets, recipes, the command."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.train.__main__ import main
from engine.train.data import Documents, Packer, write_documents
from engine.train.dialogue import ChatTemplate, LossWeights
from engine.train.distributed import Group
from engine.train.model import ModelConfig, Qwen3
from engine.train.recipe import RecipeError, TrainRecipe, load_recipe
from engine.train.tokenizer import Encoder
from engine.train.trainer import Budget, StepReport, Trainer, weighted_loss

ROOT = Path(__file__).resolve().parents[3]
PEBBLE = ROOT / "engine" / "assets" / "pebble"
RECIPE = TrainRecipe(
    sequence_len=48,
    max_document_len=49,
    batch_sequences=4,
    muon_lr=0.02,
    adam_lr=0.01,
    weight_decay=0.01,
    warmup_fraction=0.1,
    decay_fraction=0.5,
    max_grad_norm=1.0,
    user_loss_weight=0.0,
    tool_loss_weight=0.0,
    max_tools=1,
    empty_think_fraction=0.0,
)


CONFIG = ModelConfig(8192, 32, 48, 3, 2, 1, 16, 64)


def packer(documents: Documents) -> Packer:
    return Packer({"counting": documents}, {"counting": 1.0}, sequence_len=48, pad_id=1, seed=0)


def records(count: int = 40) -> list[dict[str, object]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {i}?"},
                {"role": "assistant", "content": f"After {i} comes {i + 1}."},
            ],
            "source": "counting",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    directory = tmp_path_factory.mktemp("tokens")
    write_documents(
        records(),
        directory,
        sources=frozenset({"counting"}),
        template=ChatTemplate((PEBBLE / "chat_template.jinja").read_text(encoding="utf-8")),
        encoder=Encoder(PEBBLE / "tokenizer.model"),
        loss=LossWeights(),
        max_len=49,
        max_tools=1,
        empty_think_fraction=0.0,
        seed=0,
    )
    return Documents.load(directory, "counting")


def trainer(
    documents: Documents,
    recipe: TrainRecipe = RECIPE,
    num_steps: int = 6,
    group: Group | None = None,
) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        Qwen3(CONFIG), packer(documents), recipe, Budget(num_steps=num_steps), seed=0, group=group
    )


def test_loss_falls(documents: Documents) -> None:
    run = trainer(documents, num_steps=30)
    losses = [run.step().loss for _ in range(30)]
    assert losses[0] == pytest.approx(9.01, abs=0.2)  # the log of the vocabulary
    assert losses[-1] < 5


@pytest.mark.parametrize("layer_dropout", [0.0, 0.5])
def test_resumed_run_equals_an_unbroken_one(
    documents: Documents, tmp_path: Path, layer_dropout: float
) -> None:
    recipe = replace(RECIPE, layer_dropout=layer_dropout, early_exit_weight=0.2)
    unbroken = trainer(documents, recipe)
    for _ in range(6):
        unbroken.step()
    first = trainer(documents, recipe)
    for _ in range(3):
        first.step()
    first.save(tmp_path)
    resumed = trainer(documents, recipe)
    assert resumed.resume(tmp_path)
    for _ in range(3):
        resumed.step()
    assert resumed.history == unbroken.history
    for (name, one), other in zip(
        unbroken.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["step-00000003.safetensors"]


def test_nothing_to_resume(documents: Documents, tmp_path: Path) -> None:
    assert not trainer(documents).resume(tmp_path)


def test_earlier_exits_join_the_loss(documents: Documents) -> None:
    run = trainer(documents)
    batch = packer(documents).batch(2)
    weight = float(batch.weights.sum())
    plain, alone = weighted_loss(run.model, batch, total_weight=weight)
    assert plain.item() == alone.item()
    shown, joined = weighted_loss(
        run.model, batch, total_weight=weight, exit_layer=0, exit_weight=1.0
    )
    assert shown.item() == plain.item()  # the report is of the last layer
    assert joined.item() == pytest.approx(2 * plain.item(), rel=0.05)  # no exit knows anything yet
    skipped, _ = weighted_loss(run.model, batch, total_weight=weight, skip=frozenset({0, 1, 2}))
    assert skipped.item() != plain.item()


def test_every_earlier_layer_is_trained_as_an_exit(documents: Documents) -> None:
    run = trainer(documents, replace(RECIPE, early_exit_weight=0.2))
    drawn = [run._exit_layer() for _ in range(300)]
    assert set(drawn) == {0, 1}  # the third is the model's own output
    assert drawn.count(1) > drawn.count(0)
    assert trainer(documents)._exit_layer() is None


@pytest.mark.parametrize("micro_sequences", [1, 3])
def test_parts_of_a_step_add_up_to_the_step(documents: Documents, micro_sequences: int) -> None:
    whole = trainer(documents)
    parted = trainer(documents, replace(RECIPE, micro_sequences=micro_sequences))
    for _ in range(3):
        assert parted.step().loss == pytest.approx(whole.step().loss, rel=1e-4)


def test_two_devices_train_as_one(documents: Documents, tmp_path: Path) -> None:
    alone = trainer(documents)
    losses = [alone.step().loss for _ in range(4)]
    script = tmp_path / "pair.py"
    directory = Path(documents.token_ids.filename).parent  # type: ignore[attr-defined]
    script.write_text(PAIR.format(directory=str(directory), out=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         str(script)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=55, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seen = [json.loads((tmp_path / f"losses-{rank}.json").read_text()) for rank in range(2)]
    for one in seen:
        assert one == pytest.approx(losses, rel=1e-4)


PAIR = """
import json
from pathlib import Path
from engine.train.data import Documents
from engine.train.distributed import Group
from tests.engine.train.test_train_run import trainer

group = Group.join("cpu")
run = trainer(Documents.load(Path({directory!r}), "counting"), group=group)
losses = [run.step().loss for _ in range(4)]
# Not printed: lines of two processes can run together.
Path({out!r}, f"losses-{{group.rank}}.json").write_text(json.dumps(losses))
group.leave()
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # those of torch's compiler, of itself
def test_compiled_blocks_compute_the_same(documents: Documents) -> None:
    plain, compiled = trainer(documents), trainer(documents)
    compiled.model.compile_blocks()
    for _ in range(2):
        assert compiled.step().loss == pytest.approx(plain.step().loss, rel=1e-5)


class Clock:
    """Seconds that pass as told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step_s = 1.0

    def __call__(self) -> float:
        self.now += self.step_s / 2  # asked twice a step
        return self.now


def test_time_budget_leaves_out_stops_and_keeps_the_deadline(documents: Documents) -> None:
    clock = Clock()
    wall = [1000.0]
    budget = Budget(train_s=10, deadline=1025)
    run = Trainer(Qwen3(CONFIG), packer(documents), RECIPE, budget, seed=0,
                  clock=clock, wall_clock=lambda: wall[0])  # fmt: skip
    assert run.step().progress == pytest.approx(0.05)
    clock.step_s = 200.0  # stopped meanwhile
    assert run.step().train_s == pytest.approx(0.5)
    clock.step_s = 1.0
    wall[0] = 1024.5
    assert run.step().progress == pytest.approx(1 / 1.5)
    wall[0] = 1025.0
    assert run.progress == 1.0


def test_budget_wants_one_measure() -> None:
    with pytest.raises(ValueError, match="either"):
        Budget()
    with pytest.raises(ValueError, match="either"):
        Budget(num_steps=3, train_s=3.0)


SMALL_RECIPE = """
seed = 1
[tokenizer]
vocab_size = 310
character_coverage = 1.0
sample_chars = 3000
chinese_factor = 1.0
[model]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
max_position_embeddings = 128
[train]
sequence_len = 64
max_document_len = 65
batch_sequences = 2
muon_lr = 0.02
adam_lr = 0.01
weight_decay = 0.0
warmup_fraction = 0.1
decay_fraction = 0.5
max_grad_norm = 1.0
user_loss_weight = 0.2
max_tools = 1
tool_loss_weight = 0.0
empty_think_fraction = 0.1
[mixture]
counting = 1
"""


def command_arguments(directory: Path, recipe: str = SMALL_RECIPE) -> list[str]:
    """Writes a recipe and a little data; the command line that uses them."""
    (directory / "recipe.toml").write_text(recipe)
    for split in ("train", "heldout"):
        (directory / split).mkdir()
        with lzma.open(directory / split / "c.jsonl.xz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records())
    paths = {"--data": directory, "--out": directory / "out", "--recipe": directory / "recipe.toml"}
    arguments = [part for name, path in paths.items() for part in (name, str(path))]
    return [*arguments, "--threads", "1", "--no-compile"]


def test_command_makes_a_model_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command_arguments(tmp_path)
    assert main([*arguments, "--steps", "3"]) == 0
    assert main([*arguments, "--steps", "5"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["num_steps"] == 5
    assert report["heldout"]["counting"]["num_targets"] > 0
    assert {path.name for path in (out / "model").iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip


def test_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert main(arguments) == 2
    assert "no *.jsonl.xz files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", [PEBBLE / "recipe.toml", *(ROOT / "engine" / "train" / "recipes").glob("*.toml")]
)
def test_recipes_are_sound(path: Path) -> None:
    recipe = load_recipe(path)
    assert sum(recipe.mixture.values()) == pytest.approx(1.0)
    assert recipe.model.vocab_size == recipe.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("muon_lr = 0.02", "muon_rate = 0.02", "muon_rate"),
        ("muon_lr = 0.02", "", "muon_lr"),
        ("counting = 1", "counting = 0", "above zero"),
        ("seed = 1", "sed = 1", "sed"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(SMALL_RECIPE.replace(old, new))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_terminated_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*command_arguments(tmp_path), "--steps", "4"]
    plain_step = Trainer.step

    def step(self: Trainer) -> StepReport:
        report = plain_step(self)
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(SystemExit, match="goes on from here"):
        main(arguments)
    state = json.loads((tmp_path / "out" / "checkpoint" / "state.json").read_text())
    assert state["step"] == 2
    assert main(arguments) == 0


def test_too_little_text_for_the_vocabulary_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command_arguments(tmp_path, SMALL_RECIPE.replace("= 310", "= 5000"))
    assert main([*arguments, "--steps", "4"]) == 2
    assert "cannot train a tokenizer" in capsys.readouterr().err
