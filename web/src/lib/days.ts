/**
 * Conversations by the day of their last use, newest first.
 */
export interface Dated {
  /** Milliseconds since the epoch. */
  updatedAt: number;
}

export interface DayGroup<T> {
  label: string;
  entries: T[];
}

export function byDay<T extends Dated>(entries: readonly T[], now: number): DayGroup<T>[] {
  const groups: DayGroup<T>[] = [];
  for (const entry of [...entries].sort((a, b) => b.updatedAt - a.updatedAt)) {
    const label = dayLabel(entry.updatedAt, now);
    const last = groups.at(-1);
    if (last?.label === label) last.entries.push(entry);
    else groups.push({ label, entries: [entry] });
  }
  return groups;
}

function dayLabel(then: number, now: number): string {
  const days = calendarDays(then, now);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  if (days < 7) return new Date(then).toLocaleDateString("en", { weekday: "long" });
  if (days < 30) return "This month";
  return new Date(then).toLocaleDateString("en", { month: "long", year: "numeric" });
}

function calendarDays(then: number, now: number): number {
  const from = new Date(then).setHours(0, 0, 0, 0);
  const to = new Date(now).setHours(0, 0, 0, 0);
  // Days with a change of the clocks are 23 or 25 hours long.
  return Math.round((to - from) / 86_400_000);
}
