/**
 * Turns over the WebSocket `/v1/responses`: one turn at a time on a socket, a warm one kept.
 */
import { explain } from "./problem";
import { Refused, Silent } from "./run";
import { parseEvent, type TurnEvent } from "./wire";

/** The socket never opened: nothing was sent, so another way may be tried. */
export class NeverOpened extends Error {}

/** Longest wait for the first event, which confirms the turn. */
const CONFIRM_MS = 30_000;
/** Without a word for this long, the connection may be half dead; the turn is picked up elsewhere. */
const SILENCE_MS = 10_000;
const OPEN_TIMEOUT_MS = 10_000;
const PROTOCOL = "millrace";
const KEY_PROTOCOL = "millrace-key.";

/** An asynchronous queue of what one socket says during one turn. */
class Inbox {
  #events: TurnEvent[] = [];
  #wake: (() => void) | null = null;
  closed = false;

  push(event: TurnEvent): void {
    this.#events.push(event);
    this.#wake?.();
  }

  close(): void {
    this.closed = true;
    this.#wake?.();
  }

  /** Returns the next event, or null when the socket is closed or left. Throws Silent after `patience_ms`. */
  async next(patience_ms: number): Promise<TurnEvent | null> {
    if (this.#events.length === 0 && !this.closed) {
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, patience_ms);
        this.#wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
      this.#wake = null;
    }
    const event = this.#events.shift();
    if (event === undefined && !this.closed) throw new Silent("the WebSocket is silent");
    return event ?? null;
  }
}

const TERMINAL = new Set(["response.completed", "response.incomplete", "response.failed", "response.cancelled"]);

export class SocketTurns {
  /** Offered as a subprotocol: browsers cannot set headers of a WebSocket. */
  #apiKey: string | null = null;
  readonly #url: string;
  #idle: WebSocket | null = null;

  constructor(url: string) {
    this.#url = url;
  }

  /** Sets the key for sockets to come; one that was opened with another is not used again. */
  set apiKey(key: string | null) {
    if (key === this.#apiKey) return;
    this.#apiKey = key;
    this.dropIdle();
  }

  /** Closes the socket that is kept for the next turn: after a sleep or in another network it may be dead. */
  dropIdle(): void {
    this.#idle?.close();
    this.#idle = null;
  }

  async *create(body: Record<string, unknown>, signal: AbortSignal): AsyncGenerator<TurnEvent> {
    const socket = await this.#take();
    const inbox = new Inbox();
    const close = (): void => inbox.close();
    socket.onmessage = ({ data }) => {
      const event = typeof data === "string" ? parseEvent(data) : null;
      if (event !== null) inbox.push(event);
    };
    socket.onclose = close;
    signal.addEventListener("abort", close);
    let reusable = false;
    let patience_ms = CONFIRM_MS;
    try {
      socket.send(JSON.stringify({ type: "response.create", ...body }));
      for (;;) {
        const event = await inbox.next(patience_ms);
        if (event === null) return;
        patience_ms = SILENCE_MS;
        reusable = TERMINAL.has(event.type) || event.type === "error";
        if (event.type === "error" && event.sequence_number === undefined) throw new Refused(refusal(event));
        yield event;
        if (reusable) return;
      }
    } finally {
      signal.removeEventListener("abort", close);
      this.#release(socket, reusable);
    }
  }

  async #take(): Promise<WebSocket> {
    const idle = this.#idle;
    this.#idle = null;
    if (idle?.readyState === WebSocket.OPEN) return idle;
    const socket = this.#open();
    await new Promise<void>((resolve, reject) => {
      const fail = (): void => {
        clearTimeout(timer);
        socket.close();
        reject(new NeverOpened("the WebSocket did not open"));
      };
      const timer = setTimeout(fail, OPEN_TIMEOUT_MS);
      socket.onopen = () => {
        clearTimeout(timer);
        resolve();
      };
      socket.onerror = fail;
      socket.onclose = fail;
    });
    return socket;
  }

  #open(): WebSocket {
    const protocols = this.#apiKey === null ? [PROTOCOL] : [PROTOCOL, KEY_PROTOCOL + this.#apiKey];
    try {
      return new WebSocket(this.#url, protocols);
    } catch {
      // A key may hold characters that a subprotocol may not.
      throw new NeverOpened("the key cannot be offered as a subprotocol");
    }
  }

  #release(socket: WebSocket, reusable: boolean): void {
    socket.onmessage = socket.onclose = socket.onerror = null;
    if (reusable && this.#idle === null && socket.readyState === WebSocket.OPEN) this.#idle = socket;
    else socket.close();
  }
}

function refusal(event: TurnEvent): ReturnType<typeof explain> {
  return explain({
    status: event.status ?? 400,
    code: event.error?.code ?? event.code ?? null,
    message: event.error?.message ?? event.message ?? "",
  });
}
