import { Tree, type TreeItem } from "../src/lib/tree";
import type { Item } from "../src/lib/wire";

export function question(id: string, parent_id: string | null, text: string): TreeItem {
  return { id, parent_id, type: "message", role: "user", content: [{ type: "input_text", text }] };
}

export function answer(id: string, parent_id: string | null, text: string, status = "completed"): TreeItem {
  return { id, parent_id, type: "message", role: "assistant", status, content: [{ type: "output_text", text }] };
}

/** A tree without branches: every item comes after the one before it. */
export function chain(items: readonly Item[]): Tree {
  const linked = items.map((item, at) => ({ ...item, id: item.id ?? `item-${at}`, parent_id: at === 0 ? null : (items[at - 1]?.id ?? `item-${at - 1}`) }));
  return new Tree(linked, linked.at(-1)?.id ?? null);
}
