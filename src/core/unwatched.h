// unwatched.h - loops that ThreadSanitizer is told to leave alone.
//
// For the innermost loops of what checks results, whose inputs somebody has read before: to watch
// each read takes nine tenths of the time of such a test, and finds nothing. A function that is
// marked so must not call others: they would be watched, and not be inlined.
#pragma once

#define SLUICE_UNWATCHED __attribute__((no_sanitize("thread")))
