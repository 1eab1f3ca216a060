import type { TurnEvent } from "../src/lib/wire";

/** The events of a whole answer of one item. */
export function answerEvents(deltas: readonly string[], id = "resp_1"): TurnEvent[] {
  const item = { id: "msg_1", type: "message", role: "assistant" };
  const text = deltas.join("");
  const bare: TurnEvent[] = [
    { type: "response.created", response: { id, model: "pebble" } },
    { type: "response.in_progress", response: { id } },
    { type: "response.output_item.added", item },
    { type: "response.content_part.added", item_id: "msg_1" },
    ...deltas.map((delta) => ({ type: "response.output_text.delta", item_id: "msg_1", delta })),
    { type: "response.output_text.done", item_id: "msg_1", text },
    { type: "response.content_part.done", item_id: "msg_1" },
    { type: "response.output_item.done", item: { ...item, content: [{ type: "output_text", text }] } },
    { type: "response.completed", response: { id, usage: { input_tokens: 5, output_tokens: deltas.length } } },
  ];
  return bare.map((event, at) => ({ ...event, sequence_number: at }));
}

export function delta(text: string, sequence: number): TurnEvent {
  return { type: "response.output_text.delta", item_id: "msg_1", delta: text, sequence_number: sequence };
}
