/**
 * Model, sampling and tools: null means "the model's default" and is not sent.
 */
import { TOOLS } from "./tools";

export interface Settings {
  model: string | null;
  system: string;
  temperature: number | null;
  topP: number | null;
  topK: number | null;
  maxTokens: number | null;
  seed: number | null;
  /** Kinds of the server's own tools that the model may use. */
  tools: readonly string[];
}

export const DEFAULTS: Settings = {
  model: null,
  system: "",
  temperature: null,
  topP: null,
  topK: null,
  maxTokens: null,
  seed: null,
  tools: [],
};

export interface NumberField {
  key: "temperature" | "topP" | "topK" | "maxTokens" | "seed";
  label: string;
  hint: string;
  least: number;
  most: number;
  step: number;
}

export const NUMBER_FIELDS: readonly NumberField[] = [
  { key: "temperature", label: "Temperature", hint: "0 is strict, 1 is lively.", least: 0, most: 2, step: 0.05 },
  { key: "topP", label: "Top-p", hint: "Share of likely tokens kept.", least: 0.01, most: 1, step: 0.01 },
  { key: "topK", label: "Top-k", hint: "Number of likely tokens kept.", least: 1, most: 1000, step: 1 },
  { key: "maxTokens", label: "Longest answer", hint: "In tokens.", least: 1, most: 1_000_000, step: 1 },
  { key: "seed", label: "Seed", hint: "The same seed repeats the same answer.", least: 0, most: 4_294_967_295, step: 1 },
];

/** Reads one number as typed: null when empty, a message when it will not do. */
export function readNumber(field: NumberField, typed: string): { value: number | null; error: string | null } {
  if (typed.trim() === "") return { value: null, error: null };
  const value = Number(typed);
  const whole = Number.isInteger(field.step);
  if (!Number.isFinite(value) || (whole && !Number.isInteger(value))) {
    return { value: null, error: `${field.label} must be a ${whole ? "whole number" : "number"}.` };
  }
  if (value < field.least || value > field.most) {
    return { value: null, error: `${field.label} must be between ${field.least} and ${field.most.toLocaleString("en")}.` };
  }
  return { value, error: null };
}

/** Takes what storage held, whatever it is, and keeps what is valid. */
export function readSettings(stored: unknown): Settings {
  const given = (typeof stored === "object" && stored !== null ? stored : {}) as Record<string, unknown>;
  const settings: Settings = { ...DEFAULTS };
  if (typeof given["model"] === "string") settings.model = given["model"];
  if (typeof given["system"] === "string") settings.system = given["system"];
  for (const field of NUMBER_FIELDS) {
    const value = given[field.key];
    if (typeof value === "number") settings[field.key] = readNumber(field, String(value)).value;
  }
  const tools = given["tools"];
  if (Array.isArray(tools)) settings.tools = TOOLS.map(({ kind }) => kind).filter((kind) => tools.includes(kind));
  return settings;
}

/** Returns the fields of a Responses request that these settings stand for. */
export function requestFields(settings: Settings): Record<string, unknown> {
  const fields: Record<string, unknown> = {};
  if (settings.system.trim() !== "") fields["instructions"] = settings.system;
  if (settings.temperature !== null) fields["temperature"] = settings.temperature;
  if (settings.topP !== null) fields["top_p"] = settings.topP;
  if (settings.topK !== null) fields["top_k"] = settings.topK;
  if (settings.maxTokens !== null) fields["max_output_tokens"] = settings.maxTokens;
  if (settings.seed !== null) fields["seed"] = settings.seed;
  if (settings.tools.length > 0) fields["tools"] = settings.tools.map((type) => ({ type }));
  return fields;
}
