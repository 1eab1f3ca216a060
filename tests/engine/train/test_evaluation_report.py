"""The command from end to end on a tiny model, its parts against oracles, and the model card."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM

from engine.config import Device
from engine.train.data import Documents, write_documents
from engine.train.dialogue import ChatTemplate, LossWeights
from engine.train.evaluation.__main__ import main
from engine.train.evaluation.conversations import Conversation, converse
from engine.train.evaluation.generation import Generator
from engine.train.evaluation.leaks import SourceLeaks
from engine.train.evaluation.perplexity import HeldOut, held_out_losses, joined, load_model
from engine.train.evaluation.progress import stage
from engine.train.evaluation.prompts import PROMPTS, Transcript
from engine.train.evaluation.replies import Call, Reply, parse_reply
from engine.train.evaluation.report import (
    BEGIN_MARK,
    END_MARK,
    CardError,
    Report,
    markdown,
    replace_block,
)
from engine.train.evaluation.sums import SumTally
from engine.train.evaluation.tool_calls import CallTally
from engine.train.export import export
from engine.train.model import ModelConfig, Qwen3
from engine.train.tokenizer import Encoder

PEBBLE = Path(__file__).resolve().parents[3] / "engine" / "assets" / "pebble"
TEMPLATE = (PEBBLE / "chat_template.jinja").read_text(encoding="utf-8")
RECIPE = """
seed = 1
[tokenizer]
vocab_size = 8192
character_coverage = 1.0
sample_chars = 3000
chinese_factor = 1.0
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 3
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
max_position_embeddings = 1024
[train]
sequence_len = 256
max_document_len = 256
batch_sequences = 2
muon_lr = 0.02
adam_lr = 0.01
weight_decay = 0.0
warmup_fraction = 0.1
decay_fraction = 0.5
max_grad_norm = 1.0
user_loss_weight = 0.2
tool_loss_weight = 0.0
max_tools = 1
empty_think_fraction = 0.0
[mixture]
weather = 1
talk = 1
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of three layers with Pebble's tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Qwen3(ModelConfig(8192, 32, 48, 3, 2, 1, 16, 1024))
    tokenizer = PEBBLE / "tokenizer.model"
    export(model, Encoder(tokenizer), tokenizer, TEMPLATE, directory)
    return directory


def weather(city: str) -> dict[str, Any]:
    call = {"name": "get_weather", "arguments": {"city": city}}
    return {
        "messages": [
            {"role": "user", "content": f"Weather in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "get_weather", "content": '{"sky": "blue"}'},
            {"role": "assistant", "content": f"The sky of {city} is blue."},
        ],
        "tools": [{"name": "get_weather", "description": "Weather", "parameters": {}}],
        "source": "weather",
    }


def talk(said: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": said},
            {"role": "assistant", "content": f"You said: {said}"},
        ],
        "source": "talk",
    }


def write_data(directory: Path) -> None:
    splits = {
        "train": [weather("Oslo"), talk("Hello"), {**talk("of another source"), "source": "x"}],
        "heldout": [weather("Oslo"), weather("Bergen"), talk("Good day"),
                    {**talk("of another source"), "source": "x"}],
    }  # fmt: skip
    for split, records in splits.items():
        (directory / split).mkdir()
        with lzma.open(directory / split / "all.jsonl.xz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    (directory / "recipe.toml").write_text(RECIPE)


def test_command_from_end_to_end(model_dir: Path, tmp_path: Path) -> None:
    write_data(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(f"# Tiny\n{BEGIN_MARK}\nof yesterday\n{END_MARK}\n## Limits\n")
    paths = {"--model": model_dir, "--data": tmp_path, "--out": tmp_path / "out" / "report.json",
             "--recipe": tmp_path / "recipe.toml", "--card": card}  # fmt: skip
    arguments = [part for name, path in paths.items() for part in (name, str(path))]
    assert main([*arguments, "--sums", "2", "--max-tokens", "8", "--threads", "1"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # The dialogue that is in both is named and takes no part in anything else.
    assert report["known_dialogues"] == [{"source": "weather", "begins": "Weather in Oslo?"}]
    assert report["leaks"]["weather"]["num_known_dialogues"] == 1
    assert set(report["leaks"]) == set(report["losses"]) == {"weather", "talk"}
    weather_calls = report["calls"].pop("weather")
    assert (weather_calls["num_call_turns"], weather_calls["num_other_turns"]) == (1, 1)
    assert report["calls"] == {}
    assert len(report["losses"]["talk"]["exit_losses"]) == 3
    assert [tally["num_questions"] for tally in report["sums"].values()] == [2, 2]
    assert [one["title"] for one in report["transcripts"]] == [prompt.title for prompt in PROMPTS]
    for transcript, prompt in zip(report["transcripts"], PROMPTS, strict=True):
        said = [text for role, text in transcript["turns"] if role == "user"]
        assert said == list(prompt.questions)
    text = card.read_text()
    assert "of yesterday" not in text
    assert text.startswith("# Tiny\n")
    assert text.endswith(f"{END_MARK}\n## Limits\n")
    assert (tmp_path / "out" / "report.md").read_text().strip() in text


def test_command_refuses_a_card_without_marks_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("# Tiny\n")
    arguments = ["--model", "none", "--data", "none", "--out", str(tmp_path / "r.json")]
    assert main([*arguments, "--card", str(tmp_path / "README.md")]) == 2
    assert BEGIN_MARK in capsys.readouterr().err
    assert main(arguments) == 2  # no data


@pytest.mark.parametrize("sequence_len", [300, 1000])  # a row for each document, or for both
@pytest.mark.parametrize("skip_padding", [False, True])
def test_losses_are_those_of_transformers(
    model_dir: Path, tmp_path: Path, skip_padding: bool, sequence_len: int
) -> None:
    encoder, template = Encoder(PEBBLE / "tokenizer.model"), ChatTemplate(TEMPLATE)
    write_documents(
        [weather("Bergen"), weather("Narvik")], tmp_path, sources=frozenset({"weather"}),
        template=template, encoder=encoder, loss=LossWeights(), max_len=256, max_tools=1,
        empty_think_fraction=0.0, seed=0,
    )  # fmt: skip
    model = load_model(model_dir, torch.device("cpu"))
    model.compute_dtype = torch.float32
    (result,) = held_out_losses(
        model, tmp_path, ["weather", "absent"], sequence_len=sequence_len, pad_id=1,
        skip_padding=skip_padding,
    ).values()  # fmt: skip
    oracle = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    oracle.requires_grad_(False)
    sums, count = torch.zeros(3), 0
    documents = Documents.load(tmp_path, "weather")
    for index in range(2):
        ids, weights = (torch.tensor(x.astype(int)) for x in documents.document(index))
        states = oracle(ids[None], output_hidden_states=True).hidden_states[1:]
        chosen = weights[1:] > 0
        count += int(chosen.sum())
        for layer, hidden in enumerate(states):
            # transformers gives the last state behind the final norm, the others before it.
            normed = hidden if layer == 2 else oracle.model.norm(hidden)
            logits = oracle.lm_head(normed)[0, :-1][chosen]
            sums[layer] += F.cross_entropy(logits, ids[1:][chosen], reduction="sum")
    assert result.num_targets == count
    assert result.exit_losses == pytest.approx((sums / count).tolist(), rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(sums[-1] / count), rel=1e-4)


def test_sources_are_joined_by_tokens() -> None:
    both = joined([HeldOut(1, (4.0, 1.0)), HeldOut(3, (0.0, 2.0))])
    assert both == HeldOut(4, (1.0, 1.75))


def test_generator_answers_each_dialogue_alone_and_leaves_out_long_ones(model_dir: Path) -> None:
    generator = Generator(model_dir, max_tokens=8, num_threads=1, device=Device.CPU)
    try:
        dialogues: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
            ([{"role": "user", "content": text}], []) for text in ("One", "Two", "1 " * 600)
        ]
        done: list[None] = []
        replies = generator.reply_all(dialogues, on_done=lambda: done.append(None))
        assert len(done) == 3
        assert replies[2] is None
        alone = [generator.reply_all([one])[0] for one in dialogues]
        assert replies == alone
        assert replies[0] is not None
    finally:
        generator.close()


class Scripted:
    """A model that says what it is told, and remembers what it saw."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.seen: list[list[dict[str, Any]]] = []

    def reply_all(self, dialogues: Any) -> list[Reply | None]:
        replies: list[Reply | None] = []
        for messages, _ in dialogues:
            self.seen.append(messages)
            replies.append(parse_reply(self.texts.pop(0)))
        return replies


def test_conversation_runs_tools_and_shows_their_results() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    model = Scripted(call, "It is 2.", "<tool_call>broken", "Bye")
    ran: list[Call] = []

    def run_tool(call: Call) -> str:
        ran.append(call)
        return '{"result": 2}'

    conversation = Conversation(["Add.", "Again.", "Thanks."], [{"name": "add"}], run_tool)
    converse(model, [conversation])  # type: ignore[arg-type]
    assert ran == [Call("add", {"a": 1})]
    assert model.seen[1][1:] == [
        {"role": "assistant", "content": "",
         "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "name": "add", "content": '{"result": 2}'},
    ]  # fmt: skip
    said = [(m["role"], m.get("text", m["content"])) for m in conversation.messages]
    assert said == [
        ("user", "Add."), ("assistant", call), ("tool", '{"result": 2}'), ("assistant", "It is 2."),
        ("user", "Again."), ("assistant", "<tool_call>broken"),
        ("user", "Thanks."), ("assistant", "Bye"),
    ]  # fmt: skip


def test_conversation_with_endless_calls_ends() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    conversation = Conversation(["Add."], [{"name": "add"}])
    converse(Scripted(*[call] * 9), [conversation])  # type: ignore[arg-type]
    assert sum(message["role"] == "tool" for message in conversation.messages) == 4


def small_report() -> Report:
    return Report(
        num_parameters=1,
        context=64,
        leaks={"synth_a": SourceLeaks(True, 2, 0, 3, 1, 2, 1), "b": SourceLeaks(False, 9)},
        known_dialogues=[],
        losses={"synth_a": HeldOut(10, (2.0, 1.0)), "b": HeldOut(30, (3.0, 2.0))},
        calls={"synth_a": CallTally(8, 4, 1, 6, 1, 7, 5, 4, 5), "b": CallTally(2, 0, 0)},
        sums={"seen": SumTally(3, 3, 2, 1)},
        transcripts=[Transcript("Fence", ["f"], [("user", "~~~\nHi"), ("assistant", "Ho")])],
    )


def test_tables_say_what_was_counted() -> None:
    lines = markdown(small_report()).splitlines()
    assert "| synth_a* | 10 | 1.000 | 2.72 | 7.4 |" in lines
    assert f"| **all tokens** | 40 | 1.750 | {math.exp(1.75):.2f} | {math.exp(2.75):.1f} |" in lines
    # 9 of 12 decided rightly, 6 of 7 calls wanted, 6 of 8 made, all valid; 5, 4, 5 of 8
    row = "| 8 + 4 | 75 % | 85.7 % | 75 % | 100 % | 62.5 % | 50 % | 62.5 % |"
    assert f"| synth_a* {row}" in lines
    assert "| b | 2 + 0 | 0 % | – | 0 % | – | 0 % | 0 % | 0 % |" in lines
    assert "| **all** | 10 + 4 | 64.2 % | 85.7 % | 60 % | 100 % | 50 % | 40 % | 50 % |" in lines
    assert "| seen | 3 | 100 % | 66.6 % | 33.3 % |" in lines
    assert "| synth_a* | 2 | 0 | 3 | 33.3 % | 2 | 50 % |" in lines
    assert "No held-out dialogue is in the training text." in lines
    assert lines[-5:] == ["~~~~text", "user: ~~~", "Hi", "assistant: Ho", "~~~~"]


def test_card_block_is_replaced_and_nothing_else() -> None:
    card = f"a {BEGIN_MARK} old {END_MARK} z"
    once = replace_block(card, "new")
    assert once == f"a {BEGIN_MARK}\n\nnew\n\n{END_MARK} z"
    assert replace_block(once, "new") == once


@pytest.mark.parametrize(
    "card",
    ["", BEGIN_MARK, END_MARK + BEGIN_MARK, BEGIN_MARK * 2 + END_MARK, BEGIN_MARK + END_MARK * 2],
)
def test_card_without_its_place_is_refused(card: str) -> None:
    with pytest.raises(CardError, match="each once"):
        replace_block(card, "new")


def test_bundled_card_has_its_place() -> None:
    replace_block((PEBBLE / "README.md").read_text(encoding="utf-8"), "tables")


def test_log_names_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with stage(Console(), "sums", 2) as step:
        step()
        step()
    assert "sums: 2 in 0 s" in capsys.readouterr().out
