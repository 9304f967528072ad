// lost_page.h - what the program says when a mapped file loses the page that it reads.
//
// Weights are read from mappings of a checkpoint's files. Where such a file becomes shorter
// meanwhile, as under a download that starts anew, the system sends SIGBUS instead of an error.
#pragma once

namespace sluice::cli {

/// From here on a SIGBUS of a mapped file ends the program with a line on standard error that names
/// the file, and with the exit status of a corrupt file (of an i/o error if the file has its length
/// still: its disk failed). Any other SIGBUS ends it as it did. Children of a fork inherit this.
void explain_lost_pages();

}  // namespace sluice::cli
