/**
 * Search box: asks the server when the user pauses, and drops answers that
 * arrive after a newer question was asked.
 */

export interface Suggestion {
  readonly id: string;
  readonly title: string;
  readonly score: number;
}

type Fetcher = (query: string, signal: AbortSignal) => Promise<Suggestion[]>;
type Listener = (state: SearchState) => void;

export type SearchState =
  | { kind: "idle" }
  | { kind: "loading"; query: string }
  | { kind: "done"; query: string; found: readonly Suggestion[] }
  | { kind: "failed"; query: string; message: string };

export class SearchBox {
  private timer: ReturnType<typeof setTimeout> | undefined;
  private running: AbortController | undefined;
  private readonly listeners = new Set<Listener>();
  private readonly cache = new Map<string, readonly Suggestion[]>();
  private state: SearchState = { kind: "idle" };

  constructor(
    private readonly fetcher: Fetcher,
    private readonly pauseMs = 250,
    private readonly cacheSize = 50,
  ) {}

  subscribe(listener: Listener): () => void {
    this.listeners.add(listener);
    listener(this.state);
    return () => this.listeners.delete(listener);
  }

  type(raw: string): void {
    const query = raw.trim().replace(/\s+/g, " ").toLowerCase();
    clearTimeout(this.timer);
    this.running?.abort();
    if (query.length < 2) {
      this.publish({ kind: "idle" });
      return;
    }
    const known = this.cache.get(query);
    if (known !== undefined) {
      this.publish({ kind: "done", query, found: known });
      return;
    }
    this.timer = setTimeout(() => void this.ask(query), this.pauseMs);
  }

  private async ask(query: string): Promise<void> {
    const controller = new AbortController();
    this.running = controller;
    this.publish({ kind: "loading", query });
    try {
      const found = await this.fetcher(query, controller.signal);
      if (controller.signal.aborted) return;
      const sorted = [...found].sort((a, b) => b.score - a.score || a.title.localeCompare(b.title));
      this.remember(query, sorted);
      this.publish({ kind: "done", query, found: sorted });
    } catch (error) {
      if (controller.signal.aborted) return;
      const message = error instanceof Error ? error.message : String(error);
      this.publish({ kind: "failed", query, message });
    }
  }

  private remember(query: string, found: readonly Suggestion[]): void {
    if (this.cache.size >= this.cacheSize) {
      const oldest = this.cache.keys().next().value;
      if (oldest !== undefined) this.cache.delete(oldest);
    }
    this.cache.set(query, found);
  }

  private publish(state: SearchState): void {
    this.state = state;
    for (const listener of this.listeners) listener(state);
  }
}
