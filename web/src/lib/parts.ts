/**
 * What an answer consists of, in its order: text, reasoning, and calls of tools with their results.
 */
import { itemText, type Item } from "./wire";

export interface TextPart {
  readonly kind: "text" | "reasoning";
  readonly id: string;
  readonly text: string;
  readonly done: boolean;
}

export interface CallPart {
  readonly kind: "call";
  readonly id: string;
  readonly callId: string;
  readonly name: string;
  readonly arguments: string;
  /** What the tool said; null while nobody has answered the call. */
  readonly output: string | null;
  readonly done: boolean;
}

export type Part = TextPart | CallPart;

/** Puts an item in: a new part, a part as it is now, or the result of a call that is there. */
export function withItem(parts: readonly Part[], item: Item, done: boolean): readonly Part[] {
  if (item.type === "function_call_output") {
    return parts.map((part) => (part.kind === "call" && part.callId === item.call_id ? { ...part, output: item.output ?? "" } : part));
  }
  const id = item.id ?? "";
  const old = parts.find((part) => part.id === id);
  const part = partOf(item, id, done, old);
  if (part === null) return parts;
  return old === undefined ? [...parts, part] : parts.map((one) => (one === old ? part : one));
}

function partOf(item: Item, id: string, done: boolean, old: Part | undefined): Part | null {
  if (item.type === "function_call") {
    const output = old?.kind === "call" ? old.output : null;
    return { kind: "call", id, callId: item.call_id ?? "", name: item.name ?? "", arguments: item.arguments ?? "", output, done };
  }
  if (item.type !== "message" && item.type !== "reasoning") return null;
  const known = old !== undefined && old.kind !== "call" ? old.text : "";
  const text = item.content === undefined ? known : itemText(item);
  return { kind: item.type === "message" ? "text" : "reasoning", id, text, done };
}

/** Adds to the text, the reasoning or the arguments of the part `id`; a text begins where there is none. */
export function withDelta(parts: readonly Part[], id: string, delta: string): readonly Part[] {
  if (!parts.some((part) => part.id === id)) return [...parts, { kind: "text", id, text: delta, done: false }];
  return parts.map((part) => {
    if (part.id !== id) return part;
    return part.kind === "call" ? { ...part, arguments: part.arguments + delta } : { ...part, text: part.text + delta };
  });
}

/** The answer's own words. */
export function textOf(parts: readonly Part[]): string {
  return parts
    .filter((part) => part.kind === "text" && part.text !== "")
    .map((part) => (part as TextPart).text)
    .join("\n\n");
}
