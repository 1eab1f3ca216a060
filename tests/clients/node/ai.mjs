// The Vercel AI SDK: `ai` with the models of @ai-sdk/openai and @ai-sdk/openai-compatible.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import {
  ANSWER,
  CALCULATOR,
  HELLO,
  Refused,
  STORY,
  SUM,
  TOO_LONG,
  calculator,
  raised,
  serve,
} from "./worker.mjs";

const Calculation = z.object({ expression: z.string() });
const tools = {
  calculator: tool({
    description: CALCULATOR.description,
    inputSchema: Calculation,
    execute: calculator,
  }),
};

/** The cases of one provider. `connect(key)` makes models of names, `endless` are its options. */
function cases(target, connect, endless) {
  const body = (prompt, { key = target.key, model = target.model, ...more } = {}) => ({
    model: connect(key)(model),
    prompt,
    temperature: 0,
    maxOutputTokens: 48,
    maxRetries: 0,
    ...more,
  });
  const ask = (prompt, more) => generateText(body(prompt, more));
  const looping = { tools, stopWhen: isStepCount(3) };

  async function refused(status, code, asked) {
    const error = await raised(APICallError, asked);
    assert.equal(error.statusCode, status);
    assert.equal(JSON.parse(error.responseBody).error.code, code);
    assert.equal(error.isRetryable, false);
    return `APICallError ${status}, ${code}`;
  }

  return {
    async chat() {
      const whole = await ask(HELLO);
      assert.ok(whole.text);
      assert.ok(whole.usage.totalTokens > whole.usage.outputTokens);
    },
    async stream() {
      const pieces = [];
      for await (const piece of streamText(body(HELLO)).textStream) pieces.push(piece);
      assert.ok(pieces.length > 1);
      assert.equal(pieces.join(""), (await ask(HELLO)).text);
    },
    async tools() {
      const whole = await ask(SUM, looping);
      assert.equal(whole.steps[0].toolResults[0].output, ANSWER);
      assert.ok(whole.text.includes(ANSWER));
    },
    async tools_stream() {
      const stream = streamText(body(SUM, looping));
      const kinds = new Set();
      for await (const part of stream.fullStream) kinds.add(part.type);
      assert.ok(kinds.has("tool-input-delta") && kinds.has("tool-result"));
      assert.ok((await stream.text).includes(ANSWER));
    },
    async json() {
      try {
        const whole = await ask(SUM, { output: Output.object({ schema: Calculation }) });
        assert.ok(whole.output.expression);
      } catch (error) {
        if (!APICallError.isInstance(error)) throw error;
        const { param } = JSON.parse(error.responseBody).error;
        assert.match(param, /^(response_format|text\.format\.type)$/);
        throw new Refused(`APICallError ${error.statusCode}, ${param}`);
      }
    },
    async json_by_call() {
      const toolChoice = { type: "tool", toolName: "calculator" };
      const whole = await ask(SUM, { tools, toolChoice });
      assert.equal(whole.toolCalls[0].toolName, "calculator");
      Calculation.parse(whole.toolCalls[0].input);
    },
    bad_model: () => refused(404, "model_not_found", ask(HELLO, { model: "gpt-9" })),
    bad_key: () => refused(401, "invalid_api_key", ask(HELLO, { key: "wrong" })),
    too_long: () => refused(400, "context_length_exceeded", ask(TOO_LONG)),
    async cancel() {
      const leave = new AbortController();
      const options = { maxOutputTokens: 3000, abortSignal: leave.signal, ...endless };
      for await (const piece of streamText(body(STORY, options)).textStream) {
        if (piece) leave.abort();
      }
    },
  };
}

/** Leave out what the library itself does not do through Completions. */
function ofText({ tools, tools_stream, json, json_by_call, ...rest }) {
  return rest;
}

/** Ask this server for an answer without an end; @ai-sdk/openai sends only fields it knows. */
function withoutEnd(url, init) {
  const body = JSON.parse(init.body);
  const more = (body.max_tokens ?? body.max_completion_tokens ?? body.max_output_tokens) === 3000;
  return fetch(url, more ? { ...init, body: JSON.stringify({ ...body, ignore_eos: true }) } : init);
}

function openai(target, api) {
  return (apiKey) => createOpenAI({ baseURL: target.url, apiKey, fetch: withoutEnd })[api];
}

const KINDS = {
  "openai-compatible": (target) => {
    const provider = (apiKey) =>
      createOpenAICompatible({ name: "millrace", baseURL: target.url, apiKey });
    const endless = { providerOptions: { millrace: { ignore_eos: true } } };
    return {
      chat: cases(target, provider, endless),
      completions: ofText(cases(target, (key) => provider(key).completionModel, endless)),
    };
  },
  openai: (target) => {
    const responses = cases(target, openai(target, "responses"), {
      providerOptions: { openai: { store: false } },
    });
    responses.follow_up = async () => {
      const model = openai(target, "responses")(target.key)(target.model);
      const first = await generateText({ model, prompt: HELLO, maxRetries: 0 });
      const openaiOptions = { previousResponseId: first.providerMetadata.openai.responseId };
      const second = await generateText({
        model,
        prompt: STORY,
        maxRetries: 0,
        providerOptions: { openai: openaiOptions },
      });
      assert.ok(second.usage.inputTokens > first.usage.totalTokens);
    };
    const chat = cases(target, openai(target, "chat"), {});
    return { chat, responses, completions: ofText(cases(target, openai(target, "completion"), {})) };
  },
};

const kind = process.argv[5];
await serve("ai", KINDS[kind], `@ai-sdk/${kind}`);
