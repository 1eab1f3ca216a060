/**
 * The server's own tools: which there are, and what a call and its result say in a few words.
 */
import type { CallPart } from "./parts";

export interface Tool {
  /** Its type in a request. */
  kind: string;
  /** The function that the model calls. */
  name: string;
  label: string;
  hint: string;
}

export const TOOLS: readonly Tool[] = [
  { kind: "millrace:calculator", name: "calculator", label: "Calculator", hint: "Exact arithmetic." },
  { kind: "millrace:current_time", name: "get_current_time", label: "Current time", hint: "The time of day in a city." },
  { kind: "millrace:demo_find_restaurant", name: "find_restaurant", label: "Find a restaurant", hint: "A demonstration: made-up restaurants." },
  { kind: "millrace:demo_book_restaurant", name: "book_restaurant", label: "Book a table", hint: "A demonstration: nothing is really booked." },
];

const MAX_GIST = 80;

/** What a call is called on the page. */
export function toolLabel(name: string): string {
  return TOOLS.find((tool) => tool.name === name)?.label ?? name;
}

/** The values of a call's arguments or of its result, short enough for a line. */
export function gist(json: string): string {
  const value = parsed(json);
  const values = typeof value === "object" && value !== null ? Object.values(value) : [];
  const text = (values.length > 0 ? values.map(shown).join(", ") : json).replace(/\s+/g, " ").trim();
  return text.length <= MAX_GIST ? text : `${text.slice(0, MAX_GIST - 1)}…`;
}

/** JSON laid out for reading; what is none stays as it is. */
export function pretty(json: string): string {
  const value = parsed(json);
  return value === undefined ? json : JSON.stringify(value, null, 2);
}

/** Whether a tool said that it could not. */
export function failed(call: CallPart): boolean {
  const value = call.output === null ? null : parsed(call.output);
  return typeof value === "object" && value !== null && "error" in value;
}

function parsed(json: string): unknown {
  try {
    return JSON.parse(json) as unknown;
  } catch {
    return undefined;
  }
}

function shown(value: unknown): string {
  return typeof value === "string" ? value : JSON.stringify(value);
}
