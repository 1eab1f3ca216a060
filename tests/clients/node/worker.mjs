// What a client library's cases share, and how they are asked for: as in ../python/worker.py.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

export const HELLO = "Hello, how are you?";
export const STORY = "Tell me about the weather.";
export const BEGINNING = "Once upon a time";
export const SUM = "What is 17 % of 2,340?";
export const ANSWER = "397.8";
export const TOO_LONG = "word ".repeat(6000);
export const CALCULATOR = {
  name: "calculator",
  description: "Calculate the value of a math expression",
  parameters: {
    type: "object",
    properties: { expression: { type: "string" } },
    required: ["expression"],
    additionalProperties: false,
  },
};

/** The server does not offer this, and said so in the library's own typed error. */
export class Refused extends Error {}

/** The server has no such endpoint. */
export class Absent extends Error {}

export function calculator({ expression }) {
  assert.match(expression, /^[\d\s.+*/()-]{1,80}$/);
  return String(Number(Function(`return ${expression}`)().toPrecision(6)));
}

/** Return the error of the library's own type that a promise is rejected with. */
export async function raised(kind, promise) {
  try {
    await promise;
  } catch (error) {
    if (kind.isInstance ? kind.isInstance(error) : error instanceof kind) return error;
    throw error;
  }
  throw new Error(`no ${kind.name} was thrown`);
}

async function verdict(run) {
  if (run === undefined) return { verdict: "none", note: "" };
  try {
    return { verdict: "ok", note: (await run()) ?? "" };
  } catch (error) {
    if (error instanceof Refused) return { verdict: "refused", note: error.message };
    if (error instanceof Absent) return { verdict: "absent", note: error.message };
    console.error(error);
    return { verdict: "fail", note: `${error.name}: ${error.message}`.slice(0, 300) };
  }
}

function versionOf(packageName) {
  const manifest = new URL(`node_modules/${packageName}/package.json`, import.meta.url);
  return JSON.parse(readFileSync(manifest)).version;
}

/**
 * Answer until the input ends. The cases of an API are the functions of its object; `beside` is a
 * package whose version is told with the library's.
 */
export async function serve(packageName, apis, beside) {
  const [, , url, key, model] = process.argv;
  const say = (answer) => process.stdout.write(`${JSON.stringify(answer)}\n`);
  console.log = console.error; // libraries print what they like
  const cases = apis({ url, key, model });
  const more = beside === undefined ? "" : ` (${beside} ${versionOf(beside)})`;
  say({ version: versionOf(packageName) + more });
  for await (const line of createInterface({ input: process.stdin })) {
    const [api, name] = line.split(" ");
    say(await verdict(cases[api]?.[name]));
  }
}
