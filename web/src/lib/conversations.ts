/**
 * The list of conversations, which the server keeps.
 */
export interface Conversation {
  id: string;
  title: string;
  /** Milliseconds since the epoch. */
  updatedAt: number;
  /** The item at which the branch that is shown ends. */
  head: string | null;
  /** Of a search: where its words were found, null where only the title has them. */
  match: Match | null;
}

export interface Match {
  item_id: string;
  text: string;
}

/** The conversation object of the API. */
export interface ConversationObject {
  id: string;
  title: string | null;
  updated_at: number;
  head: string | null;
  match?: Match | null;
}

export interface ConversationPage {
  entries: Conversation[];
  hasMore: boolean;
  /** How many conversations a search looked at, where it left older ones out. */
  searched: number | null;
}

export const UNTITLED = "New chat";

export function conversationOf({ id, title, updated_at, head, match }: ConversationObject): Conversation {
  return { id, title: title ?? UNTITLED, updatedAt: updated_at * 1000, head, match: match ?? null };
}

/** Puts what is new before and over what is known. */
export function merged(known: readonly Conversation[], more: readonly Conversation[]): Conversation[] {
  const fresh = new Set(more.map(({ id }) => id));
  return [...more, ...known.filter(({ id }) => !fresh.has(id))];
}

export interface Piece {
  text: string;
  found: boolean;
}

/** Parts a text into what the words of `query` match, whatever their case or accents, and the rest. */
export function findWords(text: string, query: string): Piece[] {
  const words = query.split(/\s+/).map(fold).filter((word) => word !== "");
  // Folding may change a text's length; `owner` says which character each folded one is of.
  let folded = "";
  const owner: number[] = [];
  const chars = [...text];
  for (const [at, char] of chars.entries()) {
    const one = fold(char);
    folded += one;
    for (let count = 0; count < one.length; count++) owner.push(at);
  }
  const marked = new Set<number>();
  for (const word of words) {
    for (let at = folded.indexOf(word); at >= 0; at = folded.indexOf(word, at + word.length)) {
      for (let offset = at; offset < at + word.length; offset++) marked.add(owner[offset] as number);
    }
  }
  const pieces: Piece[] = [];
  for (const [at, char] of chars.entries()) {
    const found = marked.has(at);
    const last = pieces.at(-1);
    if (last?.found === found) last.text += char;
    else pieces.push({ text: char, found });
  }
  return pieces;
}

function fold(text: string): string {
  return text.normalize("NFKD").toLowerCase().replace(/[\u0300-\u036f]/g, "");
}
