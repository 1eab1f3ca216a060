// The official @anthropic-ai/sdk: whether there is an endpoint for it.

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { Absent, HELLO, serve } from "./worker.mjs";

function messages({ url, key, model }) {
  const baseURL = url.replace(/\/v1$/, "");
  const client = new Anthropic({ baseURL, apiKey: key, maxRetries: 0 });
  return {
    async chat() {
      try {
        const asked = [{ role: "user", content: HELLO }];
        const answer = await client.messages.create({ model, max_tokens: 16, messages: asked });
        assert.ok(answer.content.length);
      } catch (error) {
        if (!(error instanceof Anthropic.NotFoundError)) throw error;
        throw new Absent(`NotFoundError ${error.status}`);
      }
    },
  };
}

await serve("@anthropic-ai/sdk", (target) => ({ messages: messages(target) }));
