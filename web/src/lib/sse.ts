/**
 * Server-sent events without I/O: text in, data fields out (WHATWG HTML, section 9.2.6).
 */
export class SseParser {
  #buffer = "";
  #data: string[] = [];

  /** Takes the next piece of text and returns the data of every event it completes. */
  push(text: string): string[] {
    this.#buffer += text;
    const complete: string[] = [];
    let start = 0;
    for (;;) {
      const end = this.#lineEnd(start);
      if (end === null) break;
      this.#line(this.#buffer.slice(start, end.at), complete);
      start = end.next;
    }
    this.#buffer = this.#buffer.slice(start);
    return complete;
  }

  #lineEnd(from: number): { at: number; next: number } | null {
    for (let at = from; at < this.#buffer.length; at++) {
      const char = this.#buffer[at];
      if (char === "\n") return { at, next: at + 1 };
      if (char !== "\r") continue;
      // A "\r" at the very end may be half of "\r\n".
      if (at + 1 === this.#buffer.length) return null;
      return { at, next: this.#buffer[at + 1] === "\n" ? at + 2 : at + 1 };
    }
    return null;
  }

  #line(line: string, complete: string[]): void {
    if (line === "") {
      if (this.#data.length > 0) complete.push(this.#data.join("\n"));
      this.#data = [];
      return;
    }
    const match = /^data:? ?/.exec(line);
    if (line === "data" || line.startsWith("data:")) this.#data.push(line.slice(match?.[0].length));
  }
}
