// Package pool runs jobs on a fixed number of goroutines and keeps the order
// of their results.
package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// ErrNoWorkers is returned for a pool that could never finish.
var ErrNoWorkers = errors.New("pool: at least one worker is needed")

// Map calls f for every item, at most workers at a time, and returns the
// results in the order of the items. The first error cancels the context that
// is handed to the others; Map waits for them before it returns.
func Map[In, Out any](
	ctx context.Context,
	workers int,
	items []In,
	f func(context.Context, In) (Out, error),
) ([]Out, error) {
	if workers < 1 {
		return nil, ErrNoWorkers
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	results := make([]Out, len(items))
	next := make(chan int)
	var group sync.WaitGroup

	for w := 0; w < min(workers, len(items)); w++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for i := range next {
				out, err := f(ctx, items[i])
				if err != nil {
					cancel(fmt.Errorf("item %d: %w", i, err))
					return
				}
				results[i] = out
			}
		}()
	}

feed:
	for i := range items {
		select {
		case next <- i:
		case <-ctx.Done():
			break feed
		}
	}
	close(next)
	group.Wait()

	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	return results, nil
}
