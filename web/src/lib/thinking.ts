/**
 * Reasoning that a model writes into its answer as `<think>…</think>`, apart from the answer itself.
 */
export interface Parted {
  thinking: string;
  answer: string;
  /** The reasoning is still being written. */
  open: boolean;
}

const OPEN = "<think>";
const CLOSE = "</think>";

export function partThinking(text: string): Parted {
  const start = text.trimStart();
  if (!start.startsWith(OPEN)) {
    // While streaming, the tag itself may be half there.
    const partial = start !== "" && OPEN.startsWith(start);
    return { thinking: "", answer: partial ? "" : text, open: partial };
  }
  const end = start.indexOf(CLOSE);
  if (end < 0) return { thinking: start.slice(OPEN.length).trim(), answer: "", open: true };
  return { thinking: start.slice(OPEN.length, end).trim(), answer: start.slice(end + CLOSE.length).trimStart(), open: false };
}
