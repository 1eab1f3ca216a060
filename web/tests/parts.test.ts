import { describe, expect, it } from "vitest";
import { textOf, withDelta, withItem, type CallPart, type Part } from "../src/lib/parts";
import { readSettings, requestFields } from "../src/lib/settings";
import { messagesOf } from "../src/lib/thread";
import { failed, gist, pretty, toolLabel } from "../src/lib/tools";
import { advance, newTurn } from "../src/lib/turn";
import type { Item, TurnEvent } from "../src/lib/wire";
import { chain } from "./items";

const user: Item = { id: "u", type: "message", role: "user", content: [{ type: "input_text", text: "17 %?" }] };
const thought: Item = { id: "r", type: "reasoning", status: "completed", content: [{ type: "reasoning_text", text: "Hm." }] };
const call: Item = { id: "c", type: "function_call", status: "completed", call_id: "k", name: "calculator", arguments: '{"expression":"1+1"}' };
const output: Item = { id: "o", type: "function_call_output", status: "completed", call_id: "k", output: '{"result": 2}' };
const answer: Item = { id: "m", type: "message", role: "assistant", status: "completed", content: [{ type: "output_text", text: "Two." }] };
const items = [user, thought, call, output, answer];

function events(): TurnEvent[] {
  const bare: TurnEvent[] = [
    { type: "response.created", response: { id: "resp_1" } },
    { type: "response.output_item.added", item: { id: "r", type: "reasoning", content: [] } },
    { type: "response.reasoning_text.delta", item_id: "r", delta: "Hm." },
    { type: "response.output_item.done", item: thought },
    { type: "response.output_item.added", item: { ...call, arguments: "" } },
    { type: "response.function_call_arguments.delta", item_id: "c", delta: '{"expression":' },
    { type: "response.function_call_arguments.delta", item_id: "c", delta: '"1+1"}' },
    { type: "response.output_item.done", item: call },
    { type: "response.output_item.added", item: output },
    { type: "response.output_item.done", item: output },
    { type: "response.output_item.added", item: { id: "m", type: "message", role: "assistant", content: [] } },
    { type: "response.output_text.delta", item_id: "m", delta: "Two." },
    { type: "response.output_item.done", item: answer },
    { type: "response.completed", response: { id: "resp_1" } },
  ];
  return bare.map((event, at) => ({ ...event, sequence_number: at }));
}

describe("an answer with tools", () => {
  it("is the same from its events as from what is stored", () => {
    const state = events().reduce((turn, event) => advance(turn, event, 0)[0], newTurn(0));
    const stored = messagesOf(chain(items), {}, new Map())[1];
    expect(state.parts.map(({ kind }) => kind)).toEqual(["reasoning", "call", "text"]);
    expect(stored).toMatchObject({ role: "assistant", place: { first: "r", last: "m" }, turn: { itemId: state.itemId, text: "Two.", phase: "completed" } });
    expect(stored?.role === "assistant" && stored.turn.parts).toEqual(state.parts);
  });

  it("grows with every event", () => {
    const seen = events().slice(0, 7).reduce((turn, event) => advance(turn, event, 0)[0], newTurn(0));
    expect(seen.parts[1]).toMatchObject({ arguments: '{"expression":"1+1"}', output: null, done: false });
    expect(seen.text).toBe("");
  });

  it("is two answers where two messages follow each other", () => {
    expect(messagesOf(chain([user, answer, { ...answer, id: "m2" }]), {}, new Map()).map(({ place }) => place.first)).toEqual(["u", "m", "m2"]);
  });

  it("is incomplete when one of its items is", () => {
    const cut = messagesOf(chain([user, { ...call, status: "incomplete" }]), {}, new Map())[1];
    expect(cut).toMatchObject({ turn: { phase: "incomplete" } });
  });
});

describe("parts", () => {
  it("ignore what they do not know", () => {
    expect(withItem([], { id: "x", type: "web_search_call" }, true)).toEqual([]);
    expect(withItem([], output, true)).toEqual([]);
  });
  it("join the texts", () => {
    const parts = ["a", "b"].reduce<readonly Part[]>((before, id) => withDelta(before, id, id), []);
    expect(textOf(parts)).toBe("a\n\nb");
  });
});

describe("a call in a few words", () => {
  it.each([
    ['{"expression":"1+1"}', "1+1"],
    ['{"result": 397.8}', "397.8"],
    ['{"a": [1], "b": "x\\ny"}', "[1], x y"],
    ["{}", "{}"],
    ["not json", "not json"],
    [`{"a":"${"x".repeat(200)}"}`, `${"x".repeat(79)}…`],
  ])("%j", (json, text) => expect(gist(json)).toBe(text));

  it("lays JSON out and leaves other text alone", () => {
    expect(pretty('{"a":1}')).toBe('{\n  "a": 1\n}');
    expect(pretty("{cut")).toBe("{cut");
  });
  it("knows errors and names", () => {
    const [part] = withItem([], call, true) as [CallPart];
    expect(failed(part)).toBe(false);
    expect(failed({ ...part, output: '{"error": "division by zero"}' })).toBe(true);
    expect([toolLabel("calculator"), toolLabel("book")]).toEqual(["Calculator", "book"]);
  });
});

describe("tools in the settings", () => {
  it("are sent when they are on, and only known ones are kept", () => {
    const settings = readSettings({ tools: ["millrace:calculator", "other", 3] });
    expect(settings.tools).toEqual(["millrace:calculator"]);
    expect(requestFields(settings)["tools"]).toEqual([{ type: "millrace:calculator" }]);
    expect(requestFields(readSettings({ tools: "x" }))).not.toHaveProperty("tools");
  });
});
