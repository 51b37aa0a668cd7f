/*
 * A queue of bytes for one writer and one reader on two threads.
 *
 * The capacity is a power of two, so that positions can count on for ever and
 * are only masked when the memory is touched: head - tail is the fill level
 * even after both have wrapped around.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct ring {
    uint8_t *data;
    size_t mask;
    _Atomic size_t head; /* next byte to be written, moved by the writer only */
    _Atomic size_t tail; /* next byte to be read, moved by the reader only */
};

static size_t round_up_pow2(size_t n)
{
    size_t p = 1;

    while (p < n)
        p <<= 1;
    return p;
}

bool ring_init(struct ring *r, size_t at_least)
{
    size_t capacity = round_up_pow2(at_least ? at_least : 1);

    r->data = malloc(capacity);
    if (!r->data)
        return false;
    r->mask = capacity - 1;
    atomic_init(&r->head, 0);
    atomic_init(&r->tail, 0);
    return true;
}

void ring_free(struct ring *r)
{
    free(r->data);
    r->data = NULL;
}

size_t ring_write(struct ring *r, const uint8_t *from, size_t n)
{
    size_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
    size_t tail = atomic_load_explicit(&r->tail, memory_order_acquire);
    size_t space = r->mask + 1 - (head - tail);
    size_t at = head & r->mask;
    size_t first;

    if (n > space)
        n = space;
    first = r->mask + 1 - at;
    if (first > n)
        first = n;
    memcpy(r->data + at, from, first);
    memcpy(r->data, from + first, n - first);
    atomic_store_explicit(&r->head, head + n, memory_order_release);
    return n;
}

size_t ring_read(struct ring *r, uint8_t *to, size_t n)
{
    size_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
    size_t head = atomic_load_explicit(&r->head, memory_order_acquire);
    size_t filled = head - tail;
    size_t at = tail & r->mask;
    size_t first;

    if (n > filled)
        n = filled;
    first = r->mask + 1 - at;
    if (first > n)
        first = n;
    memcpy(to, r->data + at, first);
    memcpy(to + first, r->data, n - first);
    atomic_store_explicit(&r->tail, tail + n, memory_order_release);
    return n;
}
