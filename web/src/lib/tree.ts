/**
 * The items of a conversation as a tree. Every item knows the one it comes after; what is shown is the
 * path from a root to the head. A tree never changes.
 */
import type { Item } from "./wire";

export interface TreeItem extends Item {
  id: string;
  parent_id: string | null;
}

export class Tree {
  readonly head: string | null;
  readonly #items: ReadonlyMap<string, TreeItem>;
  readonly #children: ReadonlyMap<string | null, readonly string[]>;

  /** `items` in the order in which they were added; a head that is not among them is none. */
  constructor(items: readonly TreeItem[] = [], head: string | null = null) {
    this.#items = new Map(items.map((item) => [item.id, item]));
    const children = new Map<string | null, string[]>();
    for (const { id, parent_id } of items) children.set(parent_id, [...(children.get(parent_id) ?? []), id]);
    this.#children = children;
    this.head = this.has(head) ? head : null;
  }

  /** Whether there is such an item; null, before every root, always is. */
  has(id: string | null): boolean {
    return id === null || this.#items.has(id);
  }

  /** What comes directly after an item (null: the roots), oldest first. */
  children(id: string | null): readonly string[] {
    return this.#children.get(id) ?? [];
  }

  item(id: string): TreeItem | undefined {
    return this.#items.get(id);
  }

  get items(): readonly TreeItem[] {
    return [...this.#items.values()];
  }

  /** The items from a root to `to`; to the head where there is no such item. */
  path(to: string | null = this.head): readonly TreeItem[] {
    const path: TreeItem[] = [];
    for (let id = this.has(to) ? to : this.head; id !== null; ) {
      const item = this.#items.get(id);
      // Every parent was added before its children, so a walk ends.
      if (item === undefined || path.length > this.#items.size) break;
      path.push(item);
      id = item.parent_id;
    }
    return path.reverse();
  }

  withHead(head: string | null): Tree {
    return new Tree(this.items, head);
  }
}
