/* Preloaded before the C library: the next allocations of the thread that asks for it succeed, then one fails. */
#include <stddef.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *old, size_t size);

static __thread long left = -1;    /* before the one that fails; -1 for none */

void fail_after(long n_allocations) { left = n_allocations; }
long allocations_left(void) { return left; }

static int fails(void) { return left >= 0 && left-- == 0; }

void *malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }
void *calloc(size_t n, size_t size) { return fails() ? NULL : __libc_calloc(n, size); }
void *realloc(void *old, size_t size) { return fails() ? NULL : __libc_realloc(old, size); }
