/* Threads: how many, and a pass by a team of them. Internal. */
#ifndef FUSEDSTEP_TEAM_H
#define FUSEDSTEP_TEAM_H

#include "fusedstep.h"

/* How many threads a pass over this many elements may use. `asked` is 0 for the default. */
int fs_threads_for(size_t n_elements, int asked);
bool fs_threads_insisted(void);

/* All of n parts of a pass over so many elements: each by a thread of its own, or one for all where that is faster. */
typedef void fs_part(const void *context, size_t part, size_t n_parts);
void fs_team_run(int n_threads, size_t n_elements, fs_part *part, const void *context);

#endif
