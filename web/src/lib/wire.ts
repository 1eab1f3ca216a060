/**
 * The parts of the server's wire format that the page reads: events and objects of the Responses
 * API (https://platform.openai.com/docs/api-reference/responses-streaming).
 */

export interface Usage {
  input_tokens: number;
  output_tokens: number;
}

export interface ResponseObject {
  id: string;
  status?: string;
  model?: string;
  usage?: Usage | null;
  error?: { code?: string | null; message?: string } | null;
  incomplete_details?: { reason?: string } | null;
  output?: Item[];
}

export interface TextPart {
  type: string;
  text?: string;
}

export interface Item {
  id?: string;
  type: string;
  role?: string;
  status?: string;
  content?: string | TextPart[];
  /** Of a call, and of what came of it. */
  call_id?: string;
  name?: string;
  arguments?: string;
  output?: string;
}

export interface ItemList {
  data: Item[];
  has_more?: boolean;
  last_id?: string | null;
}

/** An event of a turn; `type` says which of the optional fields are there. */
export interface TurnEvent {
  type: string;
  sequence_number?: number;
  response?: ResponseObject;
  item?: Item;
  item_id?: string;
  delta?: string;
  text?: string;
  /** Of an `error` event: flat as in SSE, or nested as over the WebSocket. */
  code?: string | null;
  message?: string;
  status?: number;
  error?: { code?: string | null; message?: string; type?: string };
}

/** Returns the event in one frame of text, or null if it holds none (keep-alives, `[DONE]`). */
export function parseEvent(data: string): TurnEvent | null {
  let value: unknown;
  try {
    value = JSON.parse(data);
  } catch {
    return null;
  }
  if (typeof value !== "object" || value === null) return null;
  return typeof (value as TurnEvent).type === "string" ? (value as TurnEvent) : null;
}

/** Returns all text of an item, whatever way its content is written. */
export function itemText(item: Item): string {
  if (typeof item.content === "string") return item.content;
  return (item.content ?? []).map((part) => part.text ?? "").join("");
}
