/**
 * What a screen reader is told while an answer streams: whole sentences, each once.
 */
const SENTENCE_END = /[.!?。！？\n](?=\s|$|[\p{Script=Han}])|[。！？]/gu;

/** Returns how far `text` may be read out, given that `spoken` characters already were. */
export function speakUpTo(text: string, spoken: number, ended: boolean): number {
  if (ended) return text.length;
  let upTo = spoken;
  for (const match of text.slice(spoken).matchAll(SENTENCE_END)) {
    upTo = spoken + match.index + match[0].length;
  }
  return upTo;
}

/** Strips the Markdown signs that nobody wants to hear. */
export function spokenText(markdown: string): string {
  return markdown
    .replace(/```[^\n]*\n[\s\S]*?(```|$)/g, " (code) ")
    .replace(/[*_`#>|]+/g, " ")
    .replace(/\s+/g, " ")
    .trim();
}
