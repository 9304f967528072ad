#include "sluice/lab/files.h"

#include "core/write_text.h"

namespace sluice {

void write_file(const std::filesystem::path& path, std::string_view text) {
  write_text(path, text);
}

}  // namespace sluice
