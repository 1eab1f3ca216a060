/**
 * The server as the page sees it: a few HTTP calls, and turns over WebSocket or SSE.
 *
 * Where no socket opens, as behind some proxies, turns go over HTTP with server-sent events instead.
 */
import { conversationOf, type Conversation, type ConversationObject, type ConversationPage } from "./conversations";
import { explainBody, UNREACHABLE } from "./problem";
import { Refused, Silent, type Transport } from "./run";
import { NeverOpened, SocketTurns } from "./sockets";
import { SseParser } from "./sse";
import { Tree, type TreeItem } from "./tree";
import { parseEvent, type ItemList, type ResponseObject, type TurnEvent } from "./wire";

/** The server sends a comment every 15 s; silence beyond this means that the connection may be dead. */
const SILENCE_MS = 20_000;
/** Longest wait for the head of a stream: a turn that begins, one that is picked up again. */
const CREATE_HEAD_MS = 30_000;
const RESUME_HEAD_MS = 5000;
const PAGE_SIZE = 100;

export class Client implements Transport {
  #apiKey: string | null = null;
  readonly #base: URL;
  readonly #sockets: SocketTurns;
  #socketsWork = true;

  /** `base` is the address of the server's root, with a trailing slash. */
  constructor(base: string) {
    this.#base = new URL(base);
    const socketUrl = new URL("v1/responses", this.#base);
    socketUrl.protocol = socketUrl.protocol === "https:" ? "wss:" : "ws:";
    this.#sockets = new SocketTurns(socketUrl.href);
  }

  set apiKey(key: string | null) {
    this.#apiKey = key;
    this.#sockets.apiKey = key;
  }

  async models(): Promise<string[]> {
    const { data } = (await this.#json("GET", "v1/models")) as { data: { id: string }[] };
    return data.map(({ id }) => id);
  }

  /** Lists conversations, newest first, or those that have all words of `query`. */
  async conversations(query: string, after: string | null = null): Promise<ConversationPage> {
    const params = new URLSearchParams({ limit: String(PAGE_SIZE) });
    if (query !== "") params.set("query", query);
    if (after !== null) params.set("after", after);
    const page = (await this.#json("GET", `v1/conversations?${params.toString()}`)) as {
      data: ConversationObject[];
      has_more: boolean;
      searched?: number;
    };
    return { entries: page.data.map(conversationOf), hasMore: page.has_more, searched: page.searched ?? null };
  }

  async createConversation(title: string): Promise<Conversation> {
    return conversationOf((await this.#json("POST", "v1/conversations", { title })) as ConversationObject);
  }

  async conversation(id: string): Promise<Conversation> {
    return conversationOf((await this.#json("GET", conversationPath(id))) as ConversationObject);
  }

  /** Changes the title, or which branch is shown: that to `head`, with `descend` to the newest leaf after it. */
  async updateConversation(id: string, change: { title: string } | { head: string; descend: boolean }): Promise<Conversation> {
    return conversationOf((await this.#json("POST", conversationPath(id), change)) as ConversationObject);
  }

  /** Copies the path to the item `after` into a new conversation. */
  async fork(id: string, after: string, title: string): Promise<Conversation> {
    return conversationOf((await this.#json("POST", `${conversationPath(id)}/fork`, { after, title })) as ConversationObject);
  }

  async deleteConversation(id: string): Promise<void> {
    try {
      await this.#json("DELETE", conversationPath(id));
    } catch (error) {
      if (!(error instanceof Refused && error.problem.kind === "gone")) throw error;
    }
  }

  /** Returns a conversation's items on all branches. */
  async tree(id: string): Promise<Tree> {
    const items: TreeItem[] = [];
    const path = `${conversationPath(id)}/items?tree=true&order=asc&limit=${PAGE_SIZE}`;
    // The head first: it is among the items that are read after it.
    const { head } = await this.conversation(id);
    let after = "";
    for (;;) {
      const page = (await this.#json("GET", path + after)) as ItemList;
      items.push(...(page.data as TreeItem[]));
      const last = page.last_id ?? page.data.at(-1)?.id;
      if (page.has_more !== true || last == null) return new Tree(items, head);
      after = `&after=${encodeURIComponent(last)}`;
    }
  }

  /** Deletes an item and all that comes after it. */
  async deleteFrom(conversationId: string, itemId: string): Promise<void> {
    await this.#json("DELETE", `${conversationPath(conversationId)}/items/${encodeURIComponent(itemId)}?subtree=true`);
  }

  async response(id: string): Promise<ResponseObject> {
    return (await this.#json("GET", `v1/responses/${encodeURIComponent(id)}`)) as ResponseObject;
  }

  async cancel(responseId: string): Promise<void> {
    await this.#json("POST", `v1/responses/${encodeURIComponent(responseId)}/cancel`);
  }

  async *create(body: Record<string, unknown>, signal: AbortSignal): AsyncGenerator<TurnEvent> {
    if (this.#socketsWork) {
      try {
        yield* this.#sockets.create(body, signal);
        return;
      } catch (error) {
        if (!(error instanceof NeverOpened)) throw error;
      }
    }
    yield* this.#sse("POST", "v1/responses", { ...body, stream: true }, signal);
    // Nothing had been sent over the socket, and this way worked: the next turn goes here at once.
    this.#socketsWork = false;
  }

  resume(responseId: string, after: number | null, signal: AbortSignal, opened: () => void): AsyncGenerator<TurnEvent> {
    const from = after === null ? "" : `&starting_after=${after}`;
    return this.#sse("GET", `v1/responses/${encodeURIComponent(responseId)}?stream=true${from}`, undefined, signal, opened);
  }

  /** Trusts no connection that was opened before now. */
  wake(): void {
    this.#sockets.dropIdle();
  }

  /** Says how the server is, without throwing. */
  async ready(): Promise<"ready" | "restarting" | "away"> {
    try {
      const response = await fetch(new URL("ready", this.#base), { cache: "no-store", signal: AbortSignal.timeout(5000) });
      return response.ok ? "ready" : "restarting";
    } catch {
      return "away";
    }
  }

  async *#sse(method: string, path: string, body: unknown, outer: AbortSignal, opened: () => void = () => {}): AsyncGenerator<TurnEvent> {
    const watch = new Watch(method === "POST" ? CREATE_HEAD_MS : RESUME_HEAD_MS);
    try {
      const response = await this.#fetch(method, path, body, AbortSignal.any([outer, watch.signal]));
      if (response.body === null) return;
      opened();
      const parser = new SseParser();
      const decoder = new TextDecoder();
      const reader = response.body.getReader();
      for (;;) {
        watch.wait(SILENCE_MS);
        const { value, done } = await reader.read();
        if (done) return;
        for (const data of parser.push(decoder.decode(value, { stream: true }))) {
          const event = parseEvent(data);
          if (event !== null) yield event;
        }
      }
    } catch (error) {
      if (watch.signal.aborted && !(error instanceof Refused)) throw new Silent("the stream is silent");
      throw error;
    } finally {
      watch.end();
    }
  }

  async #json(method: string, path: string, body?: unknown): Promise<unknown> {
    const response = await this.#fetch(method, path, body, AbortSignal.timeout(20_000));
    return (await response.json()) as unknown;
  }

  async #fetch(method: string, path: string, body: unknown, signal: AbortSignal): Promise<Response> {
    const headers: Record<string, string> = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (this.#apiKey !== null) headers["Authorization"] = `Bearer ${this.#apiKey}`;
    let response: Response;
    try {
      const payload = body === undefined ? null : JSON.stringify(body);
      response = await fetch(new URL(path, this.#base), { method, headers, body: payload, signal, cache: "no-store" });
    } catch {
      throw new Refused(UNREACHABLE);
    }
    if (!response.ok) throw new Refused(explainBody(response.status, await response.text()));
    return response;
  }
}

function conversationPath(id: string): string {
  return `v1/conversations/${encodeURIComponent(id)}`;
}

/** Aborts its signal when a wait takes too long. */
class Watch {
  readonly #controller = new AbortController();
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(ms: number) {
    this.wait(ms);
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  wait(ms: number): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#controller.abort(), ms);
  }

  end(): void {
    clearTimeout(this.#timer);
    this.#controller.abort();
  }
}
