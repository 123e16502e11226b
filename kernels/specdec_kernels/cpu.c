/* One library for all operations, in the order in which they use each other. Compiled on first use: build.py. */
#include "tree_attention/cpu.c"
#include "noise/cpu.c"
#include "decoder/cpu.c"
#include "decoder/draft.c"
#include "tree_walk/cpu.c"
