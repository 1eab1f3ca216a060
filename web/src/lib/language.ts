/**
 * A guess at the language of a text by its script, for the `lang` attribute (voice, font, breaks).
 */
const SCRIPTS: readonly [string, RegExp][] = [
  ["ja", /[\p{Script=Hiragana}\p{Script=Katakana}]/gu],
  ["ko", /\p{Script=Hangul}/gu],
  ["zh", /\p{Script=Han}/gu],
];

/** Returns a BCP 47 tag, or undefined where the page's own language will do. */
export function guessLanguage(text: string): string | undefined {
  const sample = text.slice(0, 400);
  const letters = sample.match(/\p{L}/gu)?.length ?? 0;
  for (const [tag, script] of SCRIPTS) {
    if ((sample.match(script)?.length ?? 0) > letters * 0.3) return tag;
  }
  return undefined;
}
