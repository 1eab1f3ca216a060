// The ordinary examples of the official openai package, against the server at argv[2].
// Prints one line of JSON: what each example saw.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { ResponsesWS } from "openai/resources/responses/ws";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "unused", maxRetries: 0 });
const model = process.argv[3];
const messages = [{ role: "user", content: "Hello, how are you?" }];
const seen = {};

async function chat() {
  const answer = await client.chat.completions.create({
    model,
    messages,
    temperature: 0,
    max_tokens: 16,
  });
  seen.chat = answer.choices[0].message.content;
  seen.usage = answer.usage;
}

async function chatStream() {
  const stream = await client.chat.completions.create({
    model,
    messages,
    temperature: 0,
    max_tokens: 16,
    stream: true,
    stream_options: { include_usage: true },
  });
  seen.chatStream = "";
  for await (const chunk of stream) {
    seen.chatStream += chunk.choices[0]?.delta?.content ?? "";
    if (chunk.usage) seen.streamUsage = chunk.usage;
  }
}

async function chatHelper() {
  const runner = client.chat.completions.stream({
    model,
    messages,
    temperature: 0,
    max_tokens: 16,
  });
  seen.chatHelper = await runner.finalContent();
}

async function completions() {
  const answer = await client.completions.create({ model, prompt: "Once", max_tokens: 4 });
  seen.completion = answer.choices[0].text;
}

async function response() {
  const first = await client.responses.create({
    model,
    input: "Hello!",
    temperature: 0,
    max_output_tokens: 16,
  });
  seen.response = first.output_text;
  seen.retrieved = (await client.responses.retrieve(first.id)).output_text;
  const second = await client.responses.create({
    model,
    input: "And you?",
    previous_response_id: first.id,
    max_output_tokens: 4,
  });
  assert.equal(second.previous_response_id, first.id);
  await client.responses.delete(first.id);
}

async function responseStream() {
  const stream = await client.responses.create({
    model,
    input: "Hello!",
    temperature: 0,
    max_output_tokens: 16,
    stream: true,
  });
  seen.responseStream = "";
  seen.eventTypes = [];
  for await (const event of stream) {
    seen.eventTypes.push(event.type);
    if (event.type === "response.output_text.delta") seen.responseStream += event.delta;
  }
}

async function socket() {
  const connection = new ResponsesWS(client);
  seen.socket = "";
  connection.send({
    type: "response.create",
    model,
    input: "Hello!",
    temperature: 0,
    max_output_tokens: 16,
  });
  for await (const { type, message, error } of connection.stream()) {
    if (type === "error") throw error;
    if (type !== "message") continue;
    if (message.type === "response.output_text.delta") seen.socket += message.delta;
    if (message.type === "response.completed" || message.type === "response.incomplete") break;
  }
  connection.close();
}

async function errors() {
  await assert.rejects(
    client.chat.completions.create({ model, messages, temperature: 9 }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
  await assert.rejects(
    client.chat.completions.create({ model: "gpt-9", messages }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
  );
  seen.errors = true;
}

async function models() {
  seen.models = [];
  for await (const one of client.models.list()) seen.models.push(one.id);
}

for (const example of [
  chat,
  chatStream,
  chatHelper,
  completions,
  response,
  responseStream,
  socket,
  errors,
  models,
]) {
  await example();
}
console.log(JSON.stringify(seen));
