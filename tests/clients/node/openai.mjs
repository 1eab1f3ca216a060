// The official openai package.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { ResponsesWS } from "openai/resources/responses/ws";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  ANSWER,
  BEGINNING,
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

function errors(target, ask) {
  return {
    async bad_model() {
      const error = await raised(OpenAI.NotFoundError, ask(target.key, "gpt-9", HELLO));
      assert.equal(error.code, "model_not_found");
      return `NotFoundError ${error.status}`;
    },
    async bad_key() {
      const error = await raised(OpenAI.AuthenticationError, ask("wrong", target.model, HELLO));
      return `AuthenticationError ${error.status}`;
    },
    async too_long() {
      const error = await raised(OpenAI.BadRequestError, ask(target.key, target.model, TOO_LONG));
      assert.equal(error.code, "context_length_exceeded");
      return `BadRequestError ${error.status}, ${error.code}`;
    },
  };
}

async function refusing(param, promise) {
  try {
    return await promise;
  } catch (error) {
    if (!(error instanceof OpenAI.BadRequestError)) throw error;
    assert.equal(error.param, param);
    throw new Refused(`BadRequestError 400, ${error.param}`);
  }
}

function connect({ url }, apiKey) {
  return new OpenAI({ baseURL: url, apiKey, maxRetries: 0 });
}

function chat(target) {
  const client = connect(target, target.key);
  const tools = [{ type: "function", function: CALCULATOR }];
  const body = (content, more) => ({
    model: target.model,
    messages: [{ role: "user", content }],
    temperature: 0,
    max_tokens: 48,
    ...more,
  });
  const ask = (content, more) => client.chat.completions.create(body(content, more));

  async function answer(message) {
    const messages = [{ role: "user", content: SUM }, message];
    for (const call of message.tool_calls) {
      assert.equal(call.function.name, CALCULATOR.name);
      const content = calculator(JSON.parse(call.function.arguments));
      messages.push({ role: "tool", tool_call_id: call.id, content });
    }
    const last = await ask("", { messages, tools });
    assert.ok(last.choices[0].message.content.includes(ANSWER));
  }

  return {
    ...errors(target, (key, model, content) =>
      connect(target, key).chat.completions.create(body(content, { model })),
    ),
    async chat() {
      const whole = await ask(HELLO);
      assert.ok(whole.choices[0].message.content);
      assert.ok(whole.usage.total_tokens > whole.usage.completion_tokens);
    },
    async stream() {
      const pieces = [];
      const runner = client.chat.completions.stream(body(HELLO));
      runner.on("content", (delta) => pieces.push(delta));
      assert.equal(await runner.finalContent(), pieces.join(""));
      assert.ok(pieces.length > 1);
      assert.equal(pieces.join(""), (await ask(HELLO)).choices[0].message.content);
    },
    async tools() {
      await answer((await ask(SUM, { tools })).choices[0].message);
    },
    async tools_stream() {
      const results = [];
      const run = (given) => results[results.push(calculator(given)) - 1];
      const runner = client.chat.completions.runTools(
        body(SUM, {
          stream: true,
          tools: [
            { type: "function", function: { ...CALCULATOR, parse: JSON.parse, function: run } },
          ],
        }),
      );
      assert.ok((await runner.finalContent()).includes(ANSWER));
      assert.deepEqual(results, [ANSWER]);
    },
    async json() {
      const response_format = zodResponseFormat(Calculation, "calculation");
      const asked = client.chat.completions.parse(body(SUM, { response_format }));
      const whole = await refusing("response_format", asked);
      assert.ok(whole.choices[0].message.parsed.expression);
    },
    async json_by_call() {
      const whole = await client.chat.completions.parse(
        body(SUM, {
          tools: [zodFunction({ name: "calculator", parameters: Calculation })],
          tool_choice: { type: "function", function: { name: "calculator" } },
        }),
      );
      const [call] = whole.choices[0].message.tool_calls;
      Calculation.parse(call.function.parsed_arguments);
    },
    async cancel() {
      const stream = await ask(STORY, { stream: true, max_tokens: 3000, ignore_eos: true });
      for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
    },
  };
}

function responses(target) {
  const client = connect(target, target.key);
  const tools = [{ type: "function", strict: true, ...CALCULATOR }];
  const body = (input, more) => ({
    model: target.model,
    input,
    temperature: 0,
    max_output_tokens: 48,
    ...more,
  });
  const ask = (input, more) => client.responses.create(body(input, more));

  async function answer(first) {
    const input = [{ role: "user", content: SUM }, ...first.output];
    for (const item of first.output) {
      if (item.type !== "function_call") continue;
      assert.equal(item.name, CALCULATOR.name);
      const output = calculator(JSON.parse(item.arguments));
      input.push({ type: "function_call_output", call_id: item.call_id, output });
    }
    assert.ok((await ask(input, { tools })).output_text.includes(ANSWER));
  }

  return {
    ...errors(target, (key, model, input) =>
      connect(target, key).responses.create(body(input, { model })),
    ),
    async chat() {
      const whole = await ask(HELLO);
      assert.ok(whole.output_text);
      assert.ok(whole.usage.total_tokens > whole.usage.output_tokens);
    },
    async stream() {
      const pieces = [];
      const stream = client.responses.stream(body(HELLO));
      stream.on("response.output_text.delta", (event) => pieces.push(event.delta));
      assert.equal((await stream.finalResponse()).output_text, pieces.join(""));
      assert.ok(pieces.length > 1);
      assert.equal(pieces.join(""), (await ask(HELLO)).output_text);
    },
    async tools() {
      await answer(await ask(SUM, { tools }));
    },
    async tools_stream() {
      const stream = client.responses.stream(body(SUM, { tools }));
      let deltas = 0;
      stream.on("response.function_call_arguments.delta", () => (deltas += 1));
      const first = await stream.finalResponse();
      assert.ok(deltas > 0);
      for (const item of first.output) delete item.parsed_arguments;
      await answer(first);
    },
    async json() {
      const text = { format: zodTextFormat(Calculation, "calculation") };
      const whole = await refusing("text.format.type", client.responses.parse(body(SUM, { text })));
      assert.ok(whole.output_parsed.expression);
    },
    async json_by_call() {
      const tool_choice = { type: "function", name: "calculator" };
      const first = await ask(SUM, { tools, tool_choice });
      const [call] = first.output.filter((item) => item.type === "function_call");
      Calculation.parse(JSON.parse(call.arguments));
    },
    async cancel() {
      const endless = { stream: true, store: false, max_output_tokens: 3000, ignore_eos: true };
      const stream = await ask(STORY, endless);
      for await (const event of stream) if (event.type === "response.output_text.delta") break;
    },
    async follow_up() {
      const first = await ask(HELLO);
      const second = await ask(STORY, { previous_response_id: first.id });
      assert.ok(second.usage.input_tokens > first.usage.total_tokens);
    },
    async resume() {
      const events = [];
      for await (const event of await ask(HELLO, { stream: true })) {
        if (events.push(event) === 6) break;
      }
      const id = events[0].response.id;
      const query = { stream: true, starting_after: events.at(-1).sequence_number };
      for await (const event of await client.responses.retrieve(id, query)) events.push(event);
      assert.deepEqual(
        events.map((event) => event.sequence_number),
        [...events.keys()],
      );
      const deltas = events.filter((event) => event.type === "response.output_text.delta");
      const whole = await client.responses.retrieve(id);
      assert.equal(deltas.map((event) => event.delta).join(""), whole.output_text);
    },
  };
}

function websocket(target) {
  async function events(body, key = target.key, until = () => false) {
    const connection = new ResponsesWS(connect(target, key));
    const seen = [];
    try {
      connection.send({ type: "response.create", model: target.model, temperature: 0, ...body });
      for await (const { type, message, error } of connection.stream()) {
        if (type === "error") throw error;
        if (type !== "message") continue;
        seen.push(message);
        if (until(message)) break;
        if (["response.completed", "response.incomplete", "error"].includes(message.type)) break;
      }
    } finally {
      connection.close();
    }
    return seen;
  }
  const last = async (body, key) => (await events(body, key)).at(-1);
  const failure = async (body, key) => {
    try {
      return await last(body, key);
    } catch (error) {
      return error;
    }
  };

  return {
    async stream() {
      const seen = await events({ input: HELLO });
      const pieces = seen.filter((event) => event.type === "response.output_text.delta");
      assert.ok(pieces.length > 1);
      const [message] = seen.at(-1).response.output;
      assert.equal(pieces.map((event) => event.delta).join(""), message.content[0].text);
    },
    async tools_stream() {
      const tools = [{ type: "function", strict: true, ...CALCULATOR }];
      const input = [{ role: "user", content: SUM }];
      const first = (await last({ input, tools })).response;
      const [call] = first.output.filter((item) => item.type === "function_call");
      const output = calculator(JSON.parse(call.arguments));
      input.push(call, { type: "function_call_output", call_id: call.call_id, output });
      const second = (await last({ input, tools })).response;
      assert.ok(second.output.at(-1).content[0].text.includes(ANSWER));
    },
    async bad_model() {
      const { error } = await failure({ model: "gpt-9", input: HELLO });
      assert.equal(error.error?.code ?? error.code, "model_not_found");
      return "error event 404";
    },
    async bad_key() {
      const error = await failure({ input: HELLO }, "wrong");
      assert.match(String(error), /401/);
      return `${error.name} 401`;
    },
    async too_long() {
      const { error } = await failure({ input: TOO_LONG });
      assert.equal(error.error?.code ?? error.code, "context_length_exceeded");
      return "error event 400, context_length_exceeded";
    },
    async cancel() {
      const body = { input: STORY, store: false, max_output_tokens: 3000, ignore_eos: true };
      await events(body, target.key, (event) => event.type === "response.output_text.delta");
    },
    async follow_up() {
      const first = (await last({ input: HELLO })).response;
      const second = (await last({ input: STORY, previous_response_id: first.id })).response;
      assert.ok(second.usage.input_tokens > first.usage.total_tokens);
    },
  };
}

function completions(target) {
  const client = connect(target, target.key);
  const body = (prompt, more) => {
    return { model: target.model, prompt, temperature: 0, max_tokens: 24, ...more };
  };
  const ask = (prompt, more) => client.completions.create(body(prompt, more));

  return {
    ...errors(target, (key, model, prompt) =>
      connect(target, key).completions.create(body(prompt, { model })),
    ),
    async chat() {
      const whole = await ask(BEGINNING);
      assert.ok(whole.choices[0].text);
      assert.ok(whole.usage.total_tokens > whole.usage.completion_tokens);
    },
    async stream() {
      const pieces = [];
      for await (const chunk of await ask(BEGINNING, { stream: true })) {
        pieces.push(chunk.choices[0].text);
      }
      assert.ok(pieces.length > 1);
      assert.equal(pieces.join(""), (await ask(BEGINNING)).choices[0].text);
    },
    async cancel() {
      const stream = await ask(BEGINNING, { stream: true, max_tokens: 3000, ignore_eos: true });
      for await (const chunk of stream) if (chunk.choices[0].text) break;
    },
  };
}

await serve("openai", (target) => ({
  chat: chat(target),
  responses: responses(target),
  websocket: websocket(target),
  completions: completions(target),
}));
